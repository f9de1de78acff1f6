"""The sums behind an SQNR against torch in float64."""

import numpy as np
import pytest
import torch

from kernels import mxfp4
from kernels.difference import difference
from kernels.errors import NonFiniteError
from kernels.formats import decode_mxfp8, encode_mxfp8
from kernels.fp8 import decode_block_fp8


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("form", ["tiles", "channels", "bfloat16", "float16", "float32"])
def test_sums_are_those_of_the_decoded_values(scheme, form):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(200, 288, generator=generator) * 0.1
    tile = {"tiles": (128, 128), "channels": (1, 288)}.get(form)
    if tile:
        scale = torch.rand(-(-200 // tile[0]), -(-288 // tile[1]), generator=generator) * 1e-3 + 1e-4
        codes = (weight * 1000).to(torch.float8_e4m3fn)
        values, stored, tiles = decode_block_fp8(codes, scale, tile), codes.view(torch.uint8).numpy(), scale.numpy()
    else:
        stored = weight.to(getattr(torch, form))
        values, tiles = stored.float(), None
        stored = stored.view(torch.uint16).numpy() if form == "bfloat16" else stored.numpy()
    if scheme == "mxfp4":
        made = mxfp4.quantize(values, backend="reference")
        packed, decoded = made.packed.clone(), mxfp4.dequantize(made.packed, made.scale, backend="reference").double()
    else:
        made = encode_mxfp8(values)
        packed, decoded = made.codes.view(torch.uint8).clone(), decode_mxfp8(made.codes, made.scale).double()
    signal, error = difference(stored, tiles, tile, packed.numpy(), made.scale.numpy(), scheme)
    assert signal == pytest.approx(values.double().square().sum(1).numpy(), rel=1e-12)
    assert error == pytest.approx((values.double() - decoded).square().sum(1).numpy(), rel=1e-10)
    packed[3, 4] ^= 8  # a sign
    assert (difference(stored, tiles, tile, packed.numpy(), made.scale.numpy(), scheme)[1] > error).nonzero()[0].tolist() == [3]


def test_nan_gives_nan_and_a_bad_tile_scale_is_refused():
    weight, codes, scale = np.ones((1, 32), np.float32), np.zeros((1, 16), np.uint8), np.full((1, 1), 127, np.uint8)
    assert difference(weight, None, None, codes, scale, "mxfp4") == (32.0, 32.0)
    assert np.isnan(difference(weight * np.nan, None, None, codes, scale, "mxfp4")).all()
    assert np.isnan(difference(weight, None, None, codes, np.full((1, 1), 255, np.uint8), "mxfp4")[1])
    assert np.isnan(difference(np.full((1, 32), 0x7F, np.uint8), np.ones((1, 1), np.float32), (128, 128), codes, scale, "mxfp4")[0])
    with pytest.raises(ValueError, match="whole blocks"):
        difference(weight[:, :31], None, None, codes, scale, "mxfp4")
    for bad in (0.0, -0.01):
        with pytest.raises(NonFiniteError, match="tile scale"):
            difference(np.ones((1, 32), np.uint8), np.full((1, 1), bad, np.float32), (128, 128), codes, scale, "mxfp4")

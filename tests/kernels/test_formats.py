"""Decoders of other people's formats, bit for bit against the libraries that write them; refusals name the element."""

import pytest
import torch

from kernels import formats
from kernels.errors import NonFiniteError
from kernels.fp8 import decode_block_fp8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape, seed=0, below=256):
    return torch.randint(0, below, shape, generator=generator(seed), dtype=torch.uint8)


def fp8_codes(*shape, seed=0):
    codes = random_bytes(*shape, seed=seed)
    codes[(codes & 127) == 127] = 0  # NaN
    return codes.view(torch.float8_e4m3fn)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def scheme(name):
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(name, ["Linear"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_every_e8m0_byte_is_its_power_of_two(dtype):
    scale = torch.arange(255, dtype=torch.uint8).view(dtype)
    assert formats.e8m0_to_float(scale).tolist() == [2.0 ** (byte - 127) for byte in range(255)]


def test_mxfp4_decodes_like_transformers_reads_gpt_oss():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_bytes(3, 10, 4, 16), random_bytes(3, 10, 4, seed=1, below=200)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [experts, in, out]
    ours = formats.decode_mxfp4(blocks.flatten(-2), scales)
    assert torch.equal(bits(ours), bits(theirs.transpose(1, 2)))


def test_mxfp4_decodes_like_compressed_tensors_and_from_deepseeks_dtypes():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor

    packed, scale = random_bytes(16, 64), random_bytes(16, 4, seed=1, below=100) + 70
    theirs = MXFP4PackedCompressor.decompress({"weight_packed": packed.clone(), "weight_scale": scale.clone()},
                                              scheme=scheme("MXFP4A16"))["weight"]
    ours = formats.decode_mxfp4(packed, scale)
    assert torch.equal(ours.to(theirs.dtype), theirs) and torch.equal(ours, theirs.float())  # BF16 holds every value
    assert torch.equal(ours, formats.decode_mxfp4(packed.view(torch.int8), scale.view(torch.float8_e8m0fnu)))


def test_mxfp8_decodes_like_compressed_tensors():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor

    codes, scale = fp8_codes(16, 128), random_bytes(16, 4, seed=1, below=100) + 70
    theirs = MXFP8QuantizationCompressor.decompress({"weight": codes.clone(), "weight_scale": scale.clone()},
                                                    scheme=scheme("MXFP8A16"))["weight"]
    ours = formats.decode_mxfp8(codes, scale)
    assert torch.equal(ours, theirs.float())  # 4 significant bits: exact in BF16, too
    assert torch.equal(ours, decode_block_fp8(codes, formats.e8m0_to_float(scale), (1, 32)))  # the path of the conversion


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_per_tensor_and_per_channel_fp8_decode_like_compressed_tensors(strategy):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    codes, rows = fp8_codes(24, 96), 24 if strategy == "channel" else 1
    scale = torch.rand(rows, 1, generator=generator()) + 0.01
    theirs = dequantize(codes, scale if rows > 1 else scale.reshape(1),
                        args=QuantizationArgs(num_bits=8, type="float", strategy=strategy), dtype=torch.float32)
    assert torch.equal(bits(decode_block_fp8(codes, scale.expand(24, 1), (1, 96))), bits(theirs))


@pytest.mark.parametrize(("tile", "shape"), [((128, 128), (256, 384)), ((32, 32), (70, 96)), ((128, 128), (130, 200))])
def test_block_fp8_decodes_like_transformers(tile, shape):
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes = fp8_codes(*shape)
    scale = torch.rand(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]), generator=generator()) + 0.01
    theirs = finegrained._dequantize_fp8_weight(codes, scale, list(tile), torch.float32)
    assert torch.equal(bits(decode_block_fp8(codes, scale, tile)), bits(theirs))


def test_nvfp4_decodes_like_compressed_tensors_with_a_reciprocal_tensor_scale():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = random_bytes(16, 32)
    block_scale = (torch.rand(16, 4, generator=generator()) * 400 + 1).to(torch.float8_e4m3fn)
    tensor_scale = torch.tensor([813.7])
    theirs = dequantize(formats.unpack_nibbles(packed), block_scale.float(), args=scheme("NVFP4A16").weights,
                        global_scale=tensor_scale, dtype=torch.float32)
    ours = formats.decode_nvfp4(packed, block_scale, tensor_scale, reciprocal=True)
    assert torch.equal(bits(ours), bits(theirs))


def test_modelopts_nvfp4_multiplies_with_both_scales():
    packed = torch.tensor([[0x72] * 8], dtype=torch.uint8)  # even columns 1, odd columns 6
    made = formats.decode_nvfp4(packed, torch.tensor([[0.375]]).to(torch.float8_e4m3fn), torch.tensor(0.1), reciprocal=False)
    scale = torch.tensor(0.375) * torch.tensor(0.1)
    assert made[0, 0] == scale and made[0, 1] == 6 * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [96, 32])
def test_int4_decodes_like_compressed_tensors(symmetric, columns):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=symmetric)
    codes = (random_bytes(12, columns, below=16).to(torch.int8) - 8)
    scale = torch.rand(12, columns // 32, generator=generator()) + 0.01
    zero = None if symmetric else random_bytes(12, columns // 32, seed=2, below=16).to(torch.int8) - 8
    theirs = dequantize(codes, scale, zero_point=zero, args=args, dtype=torch.float32)
    ours = formats.decode_int4(pack_to_int32(codes, 4), scale, columns, zero)
    assert torch.equal(bits(ours), bits(theirs))


def test_int4_words_that_are_not_full_are_cut_at_the_columns():
    assert formats.unpack_int4(torch.tensor([[0x76543210]], dtype=torch.int32), 5).tolist() == [[-8, -7, -6, -5, -4]]


def test_mxfp8_is_encoded_as_compressed_tensors_would_but_for_448_itself():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    weight = torch.randn(64, 256, generator=generator()) * torch.exp2(torch.randint(-20, 20, (64, 1)).float())
    made = formats.encode_mxfp8(weight)
    amax = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    exponents = generate_mx_scales(amax, num_bits=8)
    theirs = MXFP8QuantizationCompressor.compress({"weight": weight, "weight_scale": torch.exp2(exponents.float() - 127)},
                                                  scheme=scheme("MXFP8A16"))
    assert torch.equal(made.scale, theirs["weight_scale"])
    assert torch.equal(made.codes.view(torch.uint8), theirs["weight"].view(torch.uint8))
    energy = formats.decode_mxfp8(made.codes, made.scale).double().square().sum()
    assert float(made.decoded) == pytest.approx(float(energy), 1e-12)


@pytest.mark.parametrize(("amax", "exponent"), [(448.0, 0), (448.00003, 1), (447.9, 0), (224.0, -1), (2.0**-149, -127),
                                                (3.2e38, 120), (256.0, 0)])
def test_mxfp8s_exponent_is_the_least_at_which_nothing_saturates(amax, exponent):
    weight = torch.zeros(1, 32)
    weight[0, 7] = -amax
    made = formats.encode_mxfp8(weight)
    assert int(made.scale) - 127 == exponent
    if amax > 1e-30:
        assert formats.decode_mxfp8(made.codes, made.scale)[0, 7] == pytest.approx(-amax, rel=2.0**-4)


def test_an_all_zero_block_keeps_its_signs_and_has_scale_byte_0():
    weight = torch.zeros(2, 32)
    weight[1] = -0.0
    made = formats.encode_mxfp8(weight)
    assert made.scale.tolist() == [[0], [0]] and made.codes.view(torch.uint8).unique().tolist() == [0, 128]


def tensor(*values, dtype=torch.float32):
    return torch.tensor(values).to(dtype)


@pytest.mark.parametrize(("decode", "what", "index"), [
    (lambda: formats.decode_mxfp4(random_bytes(2, 32), torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8)),
     "block scale", (1, 1)),
    (lambda: formats.decode_mxfp8(fp8_codes(2, 32), torch.tensor([[1], [255]], dtype=torch.uint8)), "block scale", (1, 0)),
    (lambda: formats.decode_mxfp8(torch.full((1, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn),
                                  torch.tensor([[127]], dtype=torch.uint8)), "weight", (0, 0)),
    (lambda: formats.decode_mxfp4(torch.full((1, 16), 0x77, dtype=torch.uint8), torch.tensor([[254]], dtype=torch.uint8)),
     "weight", (0, 0)),
    (lambda: formats.decode_nvfp4(random_bytes(1, 8), tensor(-1.0, dtype=torch.float8_e4m3fn)[None], tensor(1.0), False),
     "block scale", (0, 0)),
    (lambda: formats.decode_nvfp4(random_bytes(1, 8), tensor(float("nan"), dtype=torch.float8_e4m3fn)[None], tensor(1.0), True),
     "block scale", (0, 0)),
    (lambda: formats.decode_nvfp4(random_bytes(1, 8), tensor(1.0, dtype=torch.float8_e4m3fn)[None], tensor(0.0), True),
     "tensor scale", (0,)),
    (lambda: formats.decode_int4(torch.zeros(2, 4, dtype=torch.int32), tensor([1.0], [0.0]), 32), "tile scale", (1, 0)),
    (lambda: formats.decode_int4(torch.zeros(2, 4, dtype=torch.int32), tensor([float("inf")], [1.0]), 32),
     "tile scale", (0, 0)),
    (lambda: formats.encode_mxfp8(torch.full((1, 32), float("inf"))), "weight", (0, 0)),
    (lambda: formats.encode_mxfp8(torch.full((1, 32), 3.4e38)), "weight", (0, 0)),
])
def test_numbers_that_are_none_are_refused_with_their_place(decode, what, index):
    with pytest.raises(NonFiniteError) as caught:
        decode()
    assert (caught.value.what, caught.value.index) == (what, index)


def test_a_zero_block_scale_of_nvfp4_means_zeros():
    made = formats.decode_nvfp4(random_bytes(1, 8), tensor(0.0, dtype=torch.float8_e4m3fn)[None], tensor(2.0), False)
    assert not made.any()

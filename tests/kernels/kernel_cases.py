"""Weights that break kernels, by name, and the comparison of two backends; shared by all kernel tests."""

import math

import torch

from kernels import mxfp4

FP8 = torch.float8_e4m3fn
NUMBERS = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)  # e4m3fn codes that are not NaN
MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_fp8(shape: tuple[int, ...], magnitude: float = 1e-3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian block-FP8 weights, scales in magnitude * [.1, 1.1)."""
    g = generator(seed)
    codes = (torch.randn(shape, generator=g) * 100).clamp(-448, 448).to(FP8)
    tiles = (*shape[:-2], math.ceil(shape[-2] / 128), math.ceil(shape[-1] / 128))
    return codes, (torch.rand(tiles, generator=g) + 0.1) * magnitude


def every_code(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks over all codes, and blocks over each window of magnitudes, so that every code leads some block,
    and blocks of one code."""
    g = generator(1)
    codes = NUMBERS[torch.randint(0, len(NUMBERS), (64, 64), generator=g)]
    top = torch.arange(126, -1, -1).unsqueeze(1)
    low = (torch.rand(127, 64, generator=g) * (top + 1)).to(torch.uint8)
    low[:, ::32] = top.to(torch.uint8)
    low |= torch.randint(0, 2, low.shape, generator=g, dtype=torch.uint8) << 7
    flat = torch.arange(127, dtype=torch.uint8).unsqueeze(1).expand(127, 64)  # sums of 32 equal terms, the largest there are
    codes = torch.cat([codes, low, flat]).contiguous().view(FP8)
    return codes, torch.full((3, 1), scale, dtype=torch.float32)


def float_blocks() -> dict[str, torch.Tensor]:
    """float32 weights [rows, 32 n] by what is hard about them."""
    g = generator(2)
    ties = torch.tensor(MIDPOINTS + [6.0, 0.0, -0.0, 0.5, 4.0])
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(-9.0))])
    near = torch.cat([near, -near])[torch.randint(0, 2 * len(near), (40, 64), generator=g)]
    four = torch.full((8, 32), 0.25)
    four[:, 7] = torch.tensor([4.0, -4.0, 3.999, 4.001, 4.4, 4.46, 4.46875, 4.47])  # e0 - 1 wins below 4.46875
    return {
        "normal": torch.randn(33, 96, generator=g) * 0.02,
        "heavy_tailed": torch.randn(33, 96, generator=g) / torch.randn(33, 96, generator=g).abs().clamp(min=1e-3),
        "ties_at_midpoints": near,
        "ties_of_two_exponents": torch.cat([four, torch.eye(32), torch.eye(32) * 7.0, torch.eye(32) * 6.0]),
        "zeros": torch.tensor([0.0, -0.0])[torch.randint(0, 2, (4, 64), generator=g)],
        "one_zero_block_of_two": torch.cat([torch.zeros(4, 32), torch.randn(4, 32, generator=g)], dim=1),
        "subnormal": torch.randn(16, 64, generator=g) * 1e-39,
        "least_subnormal": torch.eye(32) * 2.0**-149,
        "around_least_scale": torch.randn(64, 32, generator=g) * 2.0 ** torch.arange(-140, -76).unsqueeze(1),
        "largest": torch.randn(16, 64, generator=g).clamp(-1, 1) * torch.finfo(torch.float32).max,
        "boundary_of_even_and_rceil": torch.eye(32) * torch.tensor([1.75, 1.5, 1.4999999, 1.7499999] * 8).unsqueeze(1) + 1e-9,
    }


def check_same(got: mxfp4.Quantized, truth: mxfp4.Quantized, name: str) -> None:
    """Bytes equal; decoded to a part in 10^11, signal and error, whose squares the fast backends add in float32, in 10^6."""
    for field in ("packed", "scale"):
        a, b = getattr(got, field).cpu(), getattr(truth, field)
        wrong = (a != b).nonzero()
        assert a.shape == b.shape and not len(wrong), f"{name}: {len(wrong)} of {b.numel()} {field} bytes differ, first at {wrong[0].tolist()}"
    for field in ("signal", "error", "decoded"):
        a, b = getattr(got, field).cpu(), getattr(truth, field)
        assert a.shape == b.shape and a.dtype == torch.float64, f"{name}: {field} {a.dtype} {tuple(a.shape)}"
        torch.testing.assert_close(a, b, rtol=1e-11 if field == "decoded" else 1e-6, atol=0, msg=lambda m: f"{name}: {field}: {m}")


def compare(backend: str, device: str, weight, tile_scale=None, name="", **options) -> mxfp4.Quantized:
    """Quantize on `backend` and compare with the reference; returns the reference."""
    truth = mxfp4.quantize(weight, tile_scale, backend="reference", **options)
    if options.get("importance") is not None:
        options["importance"] = options["importance"].to(device)
    moved = None if tile_scale is None else tile_scale.to(device)
    got = mxfp4.quantize(weight.to(device), moved, backend=backend, **options)
    check_same(got, truth, f"{backend} {name} {options}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = mxfp4.dequantize(got.packed, got.scale, dtype, backend=backend).cpu()
        b = mxfp4.dequantize(truth.packed, truth.scale, dtype, backend="reference")
        assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()), f"{backend} {name}: decoding to {dtype}"
    return truth


def refusals() -> dict[str, tuple]:
    """name -> (weight, tile_scale, what, index) of inputs that every backend must refuse alike."""
    plain = torch.ones(2, 40, 64)
    codes, scale = block_fp8((2, 144, 160))
    cases = {}
    for name, value in (("nan", math.nan), ("inf", math.inf), ("minus_inf", -math.inf)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = plain.clone()
            weight[1, 3, 50] = weight[1, 7, 2] = value
            cases[f"{name}_{dtype}"] = (weight.to(dtype), None, "weight", (1, 3, 50))
    for code in (0x7F, 0xFF):
        weight = codes.view(torch.uint8).clone()
        weight[0, 130, 5] = weight[0, 3, 140] = weight[1, 0, 0] = code  # the tile of the first one is not the first tile
        cases[f"fp8_nan_{code:x}"] = (weight.view(FP8), scale, "weight", (0, 3, 140))
    for name, value in (("zero", 0.0), ("negative", -1.0), ("nan", math.nan), ("inf", math.inf)):
        bad = scale.clone()
        bad[1, 0, 1] = value
        cases[f"{name}_tile_scale"] = (codes, bad, "tile scale", (1, 0, 1))
    bad, loud = scale.clone(), torch.ones(2, 144, 160).to(FP8)
    bad[1, 1, 1] = 3e38
    loud[1, 140, 150] = 448.0
    cases["overflow_of_float32"] = (loud, bad, "weight", (1, 140, 150))
    cases["two_dimensional"] = (cases["nan_torch.float32"][0][1], None, "weight", (3, 50))
    return cases


def check_refusals(backend: str, device: str) -> None:
    for name, (weight, scale, what, index) in refusals().items():
        try:
            mxfp4.quantize(weight.to(device), None if scale is None else scale.to(device), backend=backend)
        except mxfp4.NonFiniteError as error:
            assert (error.what, error.index) == (what, index), f"{backend} {name}: {error}"
            assert "\n" not in str(error) and what in str(error)
        else:
            raise AssertionError(f"{backend} {name}: accepted")


def check_gemm(backend: str, device: str, out: int = 136, columns: int = 288, tokens=(1, 7, 64)) -> None:
    """At least 45 dB in BF16 against float64, with experts without rows, one row, and odd row counts."""
    from kernels import gemm

    g = generator(5)
    made = mxfp4.quantize(torch.randn(5, out, columns, generator=g) * 0.02, backend="reference")
    for count in tokens:
        offsets = torch.tensor([0, 0, count // 3, count // 3, count, count])
        for dtype, least, integer in ((torch.bfloat16, 45, torch.int32), (torch.float16, 60, torch.int64), (torch.float32, 100, torch.int32)):
            x = torch.randn(count, columns, generator=g).to(dtype)
            truth = gemm.grouped_linear(x, made.packed, made.scale, offsets.to(integer), backend="reference")
            y = gemm.grouped_linear(*(t.to(device) for t in (x, made.packed, made.scale, offsets.to(integer))), backend=backend)
            check_noise(y, truth, least, f"{backend} grouped {count} tokens {dtype}")
            truth = gemm.linear(x, made.packed[0], made.scale[0], backend="reference")
            y = gemm.linear(*(t.to(device) for t in (x, made.packed[0], made.scale[0])), backend=backend)
            check_noise(y, truth, least, f"{backend} linear {count} tokens {dtype}")


def check_gemm_decodes_exactly(backend: str, device: str) -> None:
    """Rows of the identity give the weights themselves: every byte, under scales of normal numbers (matrix units may take others for zero)."""
    from kernels import gemm

    packed = torch.arange(256, dtype=torch.uint8).reshape(2, 128).repeat(9, 1)  # 256 columns
    scale = torch.tensor([3, 4, 30, 64, 127, 128, 200, 250, 252], dtype=torch.uint8).repeat_interleave(2)[:, None].repeat(1, 8)
    weight = mxfp4.dequantize(packed, scale, torch.bfloat16, backend="reference")
    for rows in (3, 40, 256):
        x = torch.eye(256, dtype=torch.bfloat16)[:rows]
        y = gemm.linear(x.to(device), packed.to(device), scale.to(device), backend=backend)
        assert torch.equal(y.cpu(), weight[:, :rows].T), f"{backend}, {rows} rows: {int((y.cpu() != weight[:, :rows].T).sum())} weights differ"


def check_noise(y, truth, least: float, name: str) -> None:
    ratio = 10 * math.log10(float(truth.square().sum() / (y.cpu().double() - truth).square().sum()))
    assert y.shape == truth.shape and ratio >= least, f"{name}: {ratio:.1f} dB, expected at least {least}"

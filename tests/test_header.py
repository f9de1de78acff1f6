"""Headers: exactly the format, exactly the library's bytes, and no file that lies about itself."""

import errno
import fcntl
import hashlib
import json
import math
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from stages.checkpoint import writer as writer_module
from stages.checkpoint.files import DIRECT
from stages.checkpoint.header import DTYPE_BYTES, parse_header, read_header, render_header, sorted_specs
from stages.checkpoint.reader import DTYPES, ShardReader
from stages.checkpoint.writer import ShardWriter
from stages.errors import UserError

TENSORS = {"b": torch.arange(6, dtype=torch.float32).view(2, 3).bfloat16(), "a": torch.arange(5, dtype=torch.uint8),
           "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "longer.name": torch.arange(4),
           "fp8": torch.ones(4, 4).to(torch.float8_e4m3fn), "ünïcode": torch.zeros(3, dtype=torch.float16)}


def split(raw: bytes) -> tuple[bytes, bytes]:
    """(length and JSON, the JSON alone) of a whole file's bytes."""
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return raw[:end], raw[8:end]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"a": "ü \" \\ \n"}])
def test_rendered_headers_are_byte_identical_to_the_librarys(metadata):
    """A predicted file size is only right when every byte of the header is; the order is ours, not read off the file."""
    raw = save(TENSORS, metadata)
    head, text = split(raw)
    header = parse_header(text, len(raw), "x")
    specs = sorted_specs([(name, info.dtype, info.shape) for name, info in header.tensors.items()])
    assert render_header(specs, metadata) == head


def test_tensors_of_every_dtype_come_in_the_librarys_order():
    """A re-written shard must not differ from the publisher's by its order, not even among dtypes of one size."""
    tensors = {f"{number}.{name}": torch.zeros(8, dtype=torch.uint8).view(dtype)
               for number, (name, dtype) in enumerate([(n, d) for d in reversed([getattr(torch, name) for _, name in DTYPES.values()]) for n in "ba"])}
    raw = save(tensors)
    header = parse_header(split(raw)[1], len(raw), "x")
    assert {info.dtype for info in header.tensors.values()} == set(DTYPES)
    in_file = sorted(header.tensors, key=lambda name: header.tensors[name].begin)
    assert [name for name, _, _ in sorted_specs([(n, header.tensors[n].dtype, (1,)) for n in tensors])] == in_file


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
                          st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 5), max_size=4).map(tuple)),
                max_size=8, unique_by=lambda spec: spec[0]).filter(lambda specs: all(s[0] != "__metadata__" for s in specs)))
def test_whatever_is_rendered_is_read_back(specs):
    prefix = render_header(specs, {"format": "pt"})
    size = len(prefix) + sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in specs)
    header = parse_header(prefix[8:], size, "x")
    assert [(name, info.dtype, info.shape) for name, info in header.tensors.items()] == specs
    assert (header.data_start, header.file_size, header.metadata) == (len(prefix), size, {"format": "pt"})
    assert len(prefix) % 8 == 0


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_no_damage_to_a_header_ends_in_a_traceback(noise, position, byte):
    """Either the header is still a legal one or there is one line: never another exception, never a wrong size."""
    whole = save({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.uint8)}, {"format": "pt"})
    damaged = bytearray(split(whole)[1])
    place = position % len(damaged)
    damaged[place] = byte
    for raw in (noise, bytes(damaged), bytes(damaged[:place]) + noise):
        try:
            header = parse_header(raw, len(whole), "x")
        except UserError as error:
            assert str(error).startswith("x: ") and "\n" not in str(error)
        else:
            assert header.data_start + sum(info.nbytes for info in header.tensors.values()) == len(whole)


def test_a_written_shard_is_read_back_by_the_library_bit_for_bit(tmp_path):
    save_file(TENSORS, tmp_path / "in.safetensors")
    with ShardReader(tmp_path / "in.safetensors") as reader:
        specs = sorted_specs([(name, info.dtype, info.shape) for name, info in reader.header.tensors.items()])
        with ShardWriter(tmp_path / "out.safetensors", specs, {"format": "pt"}) as writer:
            for name, _, _ in specs:
                for chunk in reader.chunks(name):
                    writer.write(name, chunk)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name).float(), tensor.float())
    assert writer.size == (tmp_path / "out.safetensors").stat().st_size


@pytest.mark.parametrize("refused", ["nothing", "opening", "writing"])
def test_a_shard_of_many_blocks_is_whole_also_where_direct_writes_are_refused(tmp_path, monkeypatch, refused):
    """Tensors across block edges, a tail that fills no page; file systems refuse O_DIRECT when opening or when writing, or write less."""
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", 1 << 16)
    system_open, system_write, calls = os.open, os.write, []

    def careful_open(path, flags, *mode, **keywords):
        if refused == "opening" and flags & DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return system_open(path, flags, *mode, **keywords)

    def careful_write(handle, data):
        calls.append(len(data))
        if refused == "writing" and fcntl.fcntl(handle, fcntl.F_GETFL) & DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return system_write(handle, data[:4096 * 3] if len(data) == 1 << 16 else data)

    monkeypatch.setattr(os, "open", careful_open)
    monkeypatch.setattr(writer_module.os, "write", careful_write)
    tensors = {name: torch.randint(256, (size,), dtype=torch.uint8) for name, size in zip("abcde", (5, 200_000, 1, 65_536, 77_777))}
    path = tmp_path / "out.safetensors"
    with ShardWriter(path, [(name, "U8", tuple(tensor.shape)) for name, tensor in tensors.items()], None, hashed={"b", "e"}) as writer:
        for name, tensor in tensors.items():
            for piece in tensor.split(30_000):
                writer.write(name, piece.numpy())
    raw = path.read_bytes()
    assert raw == save(tensors) and len(raw) == writer.size and hashlib.sha256(raw).hexdigest() == writer.sha256
    assert writer.tensor_sha256 == {name: hashlib.sha256(tensors[name].numpy()).hexdigest() for name in "be"}
    assert len(calls) > 5


@pytest.mark.parametrize("mistake", ["order", "too much", "too little"])
def test_a_shard_that_is_not_written_as_promised_does_not_appear(tmp_path, mistake):
    specs = [("a", "U8", (4,)), ("b", "U8", (4,))]
    with pytest.raises(AssertionError):
        with ShardWriter(tmp_path / "out.safetensors", specs, None) as writer:
            if mistake == "order":
                writer.write("b", b"1234")
            writer.write("a", b"12345" if mistake == "too much" else b"1234")
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError):
        with ShardWriter(tmp_path / "out.safetensors", [("a", "U8", (4,))], None) as writer:
            writer.write("a", b"12")
            raise RuntimeError
    assert not list(tmp_path.iterdir())


def file_of(table, data=b"", length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="U8", shape=(4,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(("raw", "words"), [
    (b"", "0 bytes"),
    (b"1234", "4 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    (struct.pack("<Q", 2**63) + b"{}", "claims a header"),
    (struct.pack("<Q", 101_000_000) + b"{}", "claims a header"),
    (struct.pack("<Q", 1000) + b"{}", "truncated"),
    (file_of(b"\xff\xfe{}"), "not valid JSON"),
    (file_of(b"[]"), "begin with {"),
    (file_of(b" {}"), "begin with {"),
    (file_of(b"\xef\xbb\xbf{}"), "JSON"),
    (file_of(b"{"), "not valid JSON"),
    (file_of(b"[" * 100_000), "not valid JSON"),
    (file_of(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
             b"1234"), "occurs twice"),
    (file_of({"a": entry("F5")}, b"1234"), "'F5'"),
    (file_of({"a": entry(["U8"])}, b"1234"), "dtype"),
    (file_of({"a": entry({})}, b"1234"), "dtype"),
    (file_of({"a": entry(shape=(1,) * 65)}, b"1"), "shape"),
    (file_of({"a": entry(begin=2**64, end=2**64 + 4)}, b"1234"), "data_offsets"),
    (file_of(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,' + b"9" * 5000 + b"]}}", b"1234"), "not valid JSON"),
    (file_of({"a\nb": entry(shape=(5,))}, b"1234"), "a\\nb"),
    (file_of(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"), "surrogate"),
    (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), "__metadata__"),
    (file_of({"a": entry(shape=(-4,))}, b"1234"), "shape"),
    (file_of({"a": entry(shape=(True, 4))}, b"1234"), "shape"),
    (file_of({"a": entry(shape=(4.0,))}, b"1234"), "shape"),
    (file_of({"a": entry(begin=4, end=0)}, b"1234"), "takes -4 bytes"),
    (file_of({"a": entry(shape=(2**40, 2**40))}, b"1234"), "takes 4 bytes"),
    (file_of({"a": entry("BF16")}, b"1234"), "takes 4 bytes"),
    (file_of({"a": entry(), "b": entry(begin=2, end=6)}, b"123456"), "overlaps"),
    (file_of({"a": entry(), "b": entry(begin=8, end=12)}, b"123456789012"), "hole"),
    (file_of({"a": entry(begin=4, end=8)}, b"12345678"), "hole"),
    (file_of({"a": entry()}, b"123"), "truncated"),
    (file_of({"a": entry()}, b"12345"), "after the last tensor"),
    (file_of({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), "exactly dtype, shape and data_offsets"),
    (file_of({"a": [1]}, b"1234"), "exactly dtype, shape and data_offsets"),
    (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    (file_of({"a\0b": entry()}, b"1234"), "NUL"),
])
def test_a_file_that_lies_about_itself_is_refused_in_one_line(tmp_path, raw, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        read_header(path)
    message = str(caught.value)
    assert words in message and str(path) in message and "\n" not in message, message

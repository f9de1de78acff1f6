"""The safetensors container: strict headers, bounded reads, atomic writes.

Why not only the safetensors library: passing a tensor through bit-identical, reading headers over HTTP, writing shards
larger than memory and hashing on the way all need byte offsets and streams, which the library does not give. Tests hold
these modules against the library's own reader and writer.
"""

#!/usr/bin/env python3
"""Makes the payload samples beside this file: a small ELF kernel, compressed with the tools and
options of the kernel's own build (scripts/Makefile.lib), each followed by its unpacked size.

Needs gzip, xz, zstd, lz4 and bzip2. The samples are committed; run this only to change them.
"""

import pathlib
import struct
import subprocess

HERE = pathlib.Path(__file__).parent
TEXT = 0x100_0000
CODE_BYTES = 0x5000

# Calls of one function from many places, which the x86 branch filter of xz turns into one pattern.
code = bytearray()
while len(code) < CODE_BYTES:
    code += b"\x90" * (len(code) % 7)
    code += b"\xe8" + struct.pack("<i", 0x40 - (len(code) + 5)) + b"\x48\x89\xc3"
code = bytes(code[:CODE_BYTES]) + bytes(0x3000)
identification = b"\x7fELF\x02\x01\x01" + bytes(9)
header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, TEXT + 0x10, 64, 0, 0, 64, 56, 1, 64, 0, 0)
segment = struct.pack("<IIQQQQQQ", 1, 7, 0x1000, 0xFFFF_FFFF_8100_0000, TEXT, len(code), 0x20000, 0x1000)
kernel = (identification + header + segment).ljust(0x1000, b"\0") + code
(HERE / "kernel.elf").write_bytes(kernel)

size = struct.pack("<I", len(kernel))
for name, command, tail in [
    ("gz", ["gzip", "-n", "-f", "-9"], b""),
    ("xz", ["xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB"], size),
    ("zst", ["zstd", "-22", "--ultra"], size),
    ("lz4", ["lz4", "-l", "-12", "--favor-decSpeed", "-", "-"], size),
    ("bz2", ["bzip2", "-9"], size),
    ("lzma", ["xz", "--format=lzma", "-9"], size),
]:
    packed = subprocess.run(command, input=kernel, stdout=subprocess.PIPE, check=True).stdout
    (HERE / f"kernel.{name}").write_bytes(packed + tail)

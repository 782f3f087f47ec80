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

# A whole bzImage around the xz payload, for tests that see the crate from outside.
payload = (HERE / "kernel.xz").read_bytes()
image = (b"decompressor".ljust(0x400, b"\x90") + payload).ljust(0x600, b"\0")
setup = bytearray(1024)
for offset, layout, *values in [
    (0x1F1, "<B", 1),  # setup_sects
    (0x1F4, "<I", len(image) // 16),  # syssize
    (0x1FE, "<HBB", 0xAA55, 0xEB, 0x6A),  # boot_flag, jump
    (0x202, "<4sH", b"HdrS", 0x20F),  # header, version
    (0x211, "<B", 1),  # loadflags: loaded high
    (0x22C, "<I", 0x7FFF_FFFF),  # initrd_addr_max
    (0x236, "<H", 1),  # xloadflags: 64-bit entry
    (0x238, "<I", 2047),  # cmdline_size
    (0x248, "<II", 0x400, len(payload)),  # payload_offset, payload_length
    (0x258, "<QI", TEXT, 0x10_0000),  # pref_address, init_size
]:
    struct.pack_into(layout, setup, offset, *values)
(HERE / "vmlinuz").write_bytes(setup + image)

#!/bin/sh
# Write a small Debian for 64-bit ARM, with Python and sshd, into OUTPUT_FOLDER/root, and let the kernel run its programs by qemu.
# usage: arm64_root.sh OUTPUT_FOLDER; as root. tests/test_arm64.py runs it as a board.
set -eu
output=$1

for program in mmdebstrap qemu-aarch64-static; do
  command -v "$program" > /dev/null || {
    echo "error: $program is missing; run: apt install mmdebstrap qemu-user-static" >&2
    exit 2
  }
done
binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc none $binfmt
# F: the kernel opens qemu now, so that it need not lie in the root
[ -e $binfmt/qemu-aarch64 ] || printf '%s' ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:'"$(command -v qemu-aarch64-static)"':FP' > $binfmt/register
if ! [ -f "$output/complete" ]; then
  rm -rf "$output/root"
  mkdir -p "$output"
  mmdebstrap --quiet --arch=arm64 --variant=minbase --include=openssh-server,python3-venv stable "$output/root"
  touch "$output/complete"
fi
echo "$output/root: $(cat "$output/root/etc/debian_version"), arm64"

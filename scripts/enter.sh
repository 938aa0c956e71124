#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Second half of in_root() in buildroot.sh: runs in namespaces of its own.
# usage: enter.sh REPOSITORY CACHE BUILDROOT COMMAND...

set -euo pipefail

repo=$1 cache=$2 buildroot=$3
shift 3

new=$buildroot/mnt
mount -t tmpfs -o mode=755 tmpfs "$new"
for entry in "$buildroot"/*; do
	name=${entry##*/}
	if [ -L "$entry" ]; then
		ln -s "$(readlink "$entry")" "$new/$name"
	else
		mkdir "$new/$name"
	fi
done

readonly_bind()
{
	mount --bind "$1" "$2"
	# Without privileges, the machine's own options stay in force, and the files belong to
	# others anyway.
	mount -o remount,bind,ro "$2" 2>/dev/null || true
}

for name in usr etc opt; do
	readonly_bind "$buildroot/$name" "$new/$name"
done
mkdir -p "$new/var/lib/dpkg" "$new/var/tmp" "$new/src" "$new/cache" "$new/root"
readonly_bind "$buildroot/var/lib/dpkg" "$new/var/lib/dpkg"
mount --bind "$repo" "$new/src"
mount --bind "$cache" "$new/cache"
chmod 1777 "$new/tmp" "$new/var/tmp"

# The network is the machine's: its names, its certificates, its registry of crates.
for file in /etc/resolv.conf /etc/hosts /etc/ssl/certs/ca-certificates.crt; do
	if [ -e "$file" ] && [ -e "$new$file" ]; then
		mount --bind "$(readlink -f "$file")" "$new$file"
	fi
done
mkdir -p "$cache/cargo"
machine_cargo=${CARGO_HOME:-$HOME/.cargo}
for name in config.toml config; do
	if [ -e "$machine_cargo/$name" ]; then
		: >>"$cache/cargo/config.toml"
		mount --bind "$machine_cargo/$name" "$new/cache/cargo/config.toml"
		break
	fi
done

# What the user has named.
if [ -n "${KDIR:-}" ]; then
	mkdir "$new/kdir"
	readonly_bind "$KDIR" "$new/kdir"
fi
if [ -n "${KERNEL_CONFIG_FILE:-}" ]; then
	: >"$new/config"
	mount --bind "$KERNEL_CONFIG_FILE" "$new/config"
fi

# A /dev of its own: a tool that changes the mode of a device must not change the machine's.
mount -t tmpfs -o mode=755 tmpfs "$new/dev"
device()
{
	if ! mknod -m 666 "$new/dev/$1" c "$2" "$3" 2>/dev/null; then
		: >"$new/dev/$1"
		mount --bind "/dev/$1" "$new/dev/$1"
	fi
}
device null 1 3
device zero 1 5
device full 1 7
device random 1 8
device urandom 1 9
device tty 5 0
if [ -w /dev/kvm ]; then
	: >"$new/dev/kvm"
	mount --bind /dev/kvm "$new/dev/kvm"
fi
mkdir -m 1777 "$new/dev/shm"
mkdir "$new/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$new/dev/pts"
ln -s pts/ptmx "$new/dev/ptmx"
ln -s /proc/self/fd "$new/dev/fd"
ln -s fd/0 "$new/dev/stdin"
ln -s fd/1 "$new/dev/stdout"
ln -s fd/2 "$new/dev/stderr"
mount -t proc proc "$new/proc" 2>/dev/null || mount --rbind /proc "$new/proc"

# A window needs the way to the user's display.
keep=()
if [ -n "${DISPLAY_BACKEND:-}" ]; then
	if [ -d /tmp/.X11-unix ]; then
		mkdir "$new/tmp/.X11-unix"
		mount --bind /tmp/.X11-unix "$new/tmp/.X11-unix"
	fi
	if [ -e "${XAUTHORITY:-$HOME/.Xauthority}" ]; then
		: >"$new/tmp/.Xauthority"
		mount --bind "${XAUTHORITY:-$HOME/.Xauthority}" "$new/tmp/.Xauthority"
		keep+=(XAUTHORITY=/tmp/.Xauthority)
	fi
	if [ -n "${WAYLAND_DISPLAY:-}" ] && [ -d "${XDG_RUNTIME_DIR:-}" ]; then
		mkdir "$new/run/user"
		mount --bind "$XDG_RUNTIME_DIR" "$new/run/user"
		keep+=(XDG_RUNTIME_DIR=/run/user)
	fi
fi

for name in CI TERM DISPLAY WAYLAND_DISPLAY http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY \
	STEPS JOBS KDIR_NAME KERNEL_CONFIG DRM_VIRTGPU_RS DRIVER DISPLAY_BACKEND HOST CASES GUESTS GOLDEN; do
	[ -z "${!name:-}" ] || keep+=("$name=${!name}")
done

env -i PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8 CARGO_HOME=/cache/cargo "${keep[@]}" \
	chroot "$new" bash -c 'cd /src && exec "$@"' bash "$@"

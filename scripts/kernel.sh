#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# make kernel: makes what is missing, up to the kernel.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/buildroot.sh"

if [ -n "${KDIR:-}" ]; then
	[ -e "$KDIR/Kbuild" ] || die "KDIR=$KDIR is not a kernel tree."
	KDIR=$(cd "$KDIR" && pwd -P)
	export KDIR KDIR_NAME=$KDIR
fi
if [ -n "${KERNEL_CONFIG:-}" ] && [ ! -e "$repo/scripts/configs/$KERNEL_CONFIG" ]; then
	[ -f "$KERNEL_CONFIG" ] || die "KERNEL_CONFIG=$KERNEL_CONFIG is neither a file nor one of: $(cd "$repo/scripts/configs" && echo *)."
	KERNEL_CONFIG_FILE=$(realpath "$KERNEL_CONFIG")
	export KERNEL_CONFIG_FILE
fi

ensure_buildroot
in_root scripts/root/kernel.sh "$cache"

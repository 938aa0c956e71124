#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# make clean-cache: removes what these scripts made in the cache, and nothing else.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/buildroot.sh"

for name in "$cache"/lock/*; do
	[ -e "$name" ] || continue
	exec 8>"$name"
	flock -n 8 || die "Another run uses ${name##*/} in $cache: try again when it has ended."
done
for name in "$cache"/buildroot-*; do
	remove_root "$name"
done
rm -rf "$cache"/{source,linux,objects,kernel,target}-* "$cache"/{cargo,log,lock}

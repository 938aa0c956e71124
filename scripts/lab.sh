#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# make run, test, soak, shell and bench: boots guests with the kernel that build/kernel links to.
# usage: lab.sh run|test|soak|shell|bench

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/buildroot.sh"

# Programs of two clones must not meet: cargo goes by time stamps, which say nothing across clones.
in_root scripts/root/lab.sh "$1" "$(basename "$(readlink "$repo/build/kernel")")" "$(hash <<<"$repo")"

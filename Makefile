# SPDX-License-Identifier: GPL-2.0
#
# In a kernel tree this is the driver's Kbuild file. Anywhere else it has the developer's targets: see "make help".

ifneq ($(srctree),)

obj-$(CONFIG_DRM_VIRTGPU_RS) += virtgpu-rs.o
virtgpu-rs-y := virtgpu_rs.o

else

MAKEFLAGS += --no-print-directory
export KDIR KERNEL_CONFIG DRM_VIRTGPU_RS DRIVER DISPLAY_BACKEND HOST CASES GUESTS GOLDEN

.PHONY: help kernel run test soak shell bench check clean clean-cache

help:
	@sed -n 's/^#: \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

kernel:
	@STEPS=3 scripts/kernel.sh

run test soak shell bench:
	@STEPS=5 scripts/kernel.sh
	@STEPS=5 scripts/lab.sh $@

check:
	@STEPS=3 scripts/check.sh

clean:
	rm -rf build

clean-cache:
	@scripts/clean-cache.sh

#: make run          suspend a guest while modetest draws, and compare the screen before and after
#: make test         run the tests
#: make soak         run the tests that take too long for every day
#: make kernel       build the guest's kernel with the driver: build/bzImage, vmlinux, modules/, config
#: make shell        boot to a shell on the serial line (C-a x leaves)
#: make bench        what an operation costs, in instructions: both drivers
#: make check        style, lints and documentation of everything, without warnings
#: make clean        remove build/
#: make clean-cache  remove all that was built, for every clone
#: make help         this text
#:
#: DRIVER=c                 with Linux's C driver, for the comparison (run, test, soak, shell)
#: HOST=reference           on the reference host, which keeps everything while the guest sleeps (run)
#: DISPLAY_BACKEND=gtk|sdl  in a window (run; the reference host has none)
#: CASES="name ..."         only the cases whose name contains one of these (test, soak)
#: GUESTS=number            how many guests run at once (test, soak; default: 2, each takes up to 1 GiB of memory)
#: GOLDEN=write             write anew what the golden cases compare the driver's commands with (test)
#: DRM_VIRTGPU_RS=y         the driver built in
#: KERNEL_CONFIG=name|file  a configuration of scripts/configs (guest, debug, nosleep), or a file
#: KDIR=directory           the kernel tree to lay the driver over; it is not changed
#: VIRTGPU_RS_CACHE=dir     where everything that is built lies (default: ~/.cache/virtgpu_rs)

endif

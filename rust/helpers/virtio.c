// SPDX-License-Identifier: GPL-2.0

#include <linux/virtio_config.h>
#include <xen/xen.h>

#if IS_BUILTIN(CONFIG_VIRTIO)

__rust_helper void rust_helper_virtio_device_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

__rust_helper bool
rust_helper_virtio_get_shm_region(struct virtio_device *vdev,
				  struct virtio_shm_region *region, u8 id)
{
	return virtio_get_shm_region(vdev, region, id);
}

__rust_helper bool
rust_helper_virtio_has_dma_quirk(const struct virtio_device *vdev)
{
	return virtio_has_dma_quirk(vdev);
}

__rust_helper bool rust_helper_xen_domain(void)
{
	return xen_domain();
}

#endif /* IS_BUILTIN(CONFIG_VIRTIO) */

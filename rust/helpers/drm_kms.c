// SPDX-License-Identifier: GPL-2.0

#include <drm/clients/drm_client_setup.h>
#include <drm/drm_atomic.h>
#include <drm/drm_client_event.h>
#include <drm/drm_debugfs.h>
#include <drm/drm_drv.h>
#include <linux/aperture.h>
#include <linux/pci.h>

#ifdef CONFIG_DRM

__rust_helper void
rust_helper_drm_debugfs_add_file(struct drm_device *dev, const char *name,
				 int (*show)(struct seq_file *, void *), void *data)
{
	drm_debugfs_add_file(dev, name, show, data);
}

__rust_helper bool rust_helper_drm_firmware_drivers_only(void)
{
	return drm_firmware_drivers_only();
}

__rust_helper int
rust_helper_aperture_remove_conflicting_pci_devices(struct pci_dev *pdev, const char *name)
{
	return aperture_remove_conflicting_pci_devices(pdev, name);
}

#ifdef CONFIG_RUST_DRM_KMS_HELPER

__rust_helper void rust_helper_drm_atomic_commit_put(struct drm_atomic_commit *state)
{
	drm_atomic_commit_put(state);
}

__rust_helper bool
rust_helper_drm_atomic_crtc_needs_modeset(const struct drm_crtc_state *state)
{
	return drm_atomic_crtc_needs_modeset(state);
}

__rust_helper struct drm_crtc_state *
rust_helper_drm_atomic_get_new_crtc_state(const struct drm_atomic_commit *state,
					  struct drm_crtc *crtc)
{
	return drm_atomic_get_new_crtc_state(state, crtc);
}

__rust_helper struct drm_plane_state *
rust_helper_drm_atomic_get_new_plane_state(const struct drm_atomic_commit *state,
					   struct drm_plane *plane)
{
	return drm_atomic_get_new_plane_state(state, plane);
}

__rust_helper struct drm_plane_state *
rust_helper_drm_atomic_get_old_plane_state(const struct drm_atomic_commit *state,
					   struct drm_plane *plane)
{
	return drm_atomic_get_old_plane_state(state, plane);
}

__rust_helper void rust_helper_drm_client_dev_resume(struct drm_device *dev)
{
	drm_client_dev_resume(dev);
}

__rust_helper void rust_helper_drm_client_dev_suspend(struct drm_device *dev)
{
	drm_client_dev_suspend(dev);
}

__rust_helper void rust_helper_drm_client_setup(struct drm_device *dev,
						const struct drm_format_info *format)
{
	drm_client_setup(dev, format);
}

#endif /* CONFIG_RUST_DRM_KMS_HELPER */
#endif /* CONFIG_DRM */

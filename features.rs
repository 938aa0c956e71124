// SPDX-License-Identifier: GPL-2.0

//! What the host offers and what is made of it: feature bits and the config space.
//!
//! Every number that the host says of itself outside of an answer is read here, at probe, and
//! leaves this file within bounds. What it says of events is read in `display.rs`.

use kernel::{
    device,
    prelude::*,
    virtio, //
};

use crate::{
    module_parameters,
    uapi::{
        self,
        config,
        feature, //
    }, //
};

/// The bits that a host may have moved [`feature::FREEZING`] to; none of them has a meaning yet.
const SPARE: core::ops::RangeInclusive<u32> = 6..=23;

/// The bits that the driver asks for. Which of them it keeps, [`negotiate`] decides.
pub(crate) const TABLE: [u32; 21] = {
    let mut table = [0; 21];

    table[0] = feature::EDID;
    table[1] = feature::RESOURCE_BLOB;
    table[2] = feature::BLOB_ALIGNMENT;

    let mut i = 3;
    while i < table.len() {
        table[i] = *SPARE.start() + i as u32 - 3;
        i += 1;
    }
    table
};
const _: () = assert!(TABLE[TABLE.len() - 1] == *SPARE.end());

/// Whether a host may offer [`feature::FREEZING`] on this bit.
fn is_freezing_bit(bit: u32) -> bool {
    bit == feature::FREEZING || SPARE.contains(&bit)
}

/// What the administrator says about the feature, module parameter `freezing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Override {
    /// Find out.
    Auto,
    /// The bit has some other meaning.
    Never,
    /// The bit is the feature.
    Always,
}

impl From<i32> for Override {
    fn from(value: i32) -> Self {
        match value {
            0 => Self::Never,
            1 => Self::Always,
            _ => Self::Auto,
        }
    }
}

/// Whether bit 5 of a host means [`feature::FREEZING`]; if not, it means
/// [`feature::BLOB_ALIGNMENT`].
///
/// `blob` is whether the host has blobs, without which it has no alignment for them;
/// `config_len` is the length of its config space, if the transport knows, and `alignment` reads
/// the word that holds the alignment. It is read only where there is one.
fn bit5_is_freezing(
    says: Override,
    blob: bool,
    config_len: Option<usize>,
    alignment: impl FnOnce() -> Result<u32>,
) -> bool {
    match says {
        Override::Always => return true,
        Override::Never => return false,
        Override::Auto => {}
    }
    if !blob || config_len.is_some_and(|len| len < config::BLOB_ALIGNMENT + 4) {
        return true;
    }
    // From a page to a gigabyte.
    !alignment().is_ok_and(|a| a.is_power_of_two() && (1 << 12..=1 << 30).contains(&a))
}

/// Keeps the bits that the driver has a use for; the `validate` step of a virtio driver.
///
/// Errors: [`ENODEV`] for a device older than virtio 1.0, [`EINVAL`] for one without a config
/// space.
pub(crate) fn negotiate(dev: &virtio::Negotiation<'_>) -> Result {
    if !dev.has_feature(feature::VERSION_1) {
        dev_err!(
            dev.as_ref(),
            "*ERROR* the device is older than virtio 1.0\n"
        );
        return Err(ENODEV);
    }
    // Both of these have been there since the first version of the device. What a PCI function does
    // not have reads as all ones.
    let missing = |offset| {
        dev.config_read_le32(offset)
            .map_or(true, |value| value == u32::MAX)
    };

    if missing(config::NUM_SCANOUTS) || missing(config::NUM_CAPSETS) {
        dev_err!(
            dev.as_ref(),
            "*ERROR* the device's config space is missing or too short\n"
        );
        return Err(EINVAL);
    }

    let says = Override::from(*module_parameters::freezing.value_ref());
    let moved_to = *module_parameters::freezing_bit.value_ref();

    if dev.has_feature(feature::BLOB_ALIGNMENT) {
        let freezing = moved_to == feature::FREEZING
            && bit5_is_freezing(
                says,
                dev.has_feature(feature::RESOURCE_BLOB),
                dev.config_len(),
                || dev.config_read_le32(config::BLOB_ALIGNMENT),
            );

        // An alignment is of no use without blobs.
        if !freezing {
            dev.clear_feature(feature::BLOB_ALIGNMENT);
        }
    }
    dev.clear_feature(feature::RESOURCE_BLOB);
    for bit in SPARE {
        if bit != moved_to || says == Override::Never {
            dev.clear_feature(bit);
        }
    }
    Ok(())
}

/// What was agreed on with the host, and what its config space says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    pub(crate) edid: bool,
    pub(crate) indirect: bool,
    /// The host says that it keeps its resources while the guest sleeps. Whether it understands the
    /// command for it shows when it is first sent.
    pub(crate) freezing: bool,
    /// Backings are named by DMA addresses, not physical ones.
    pub(crate) dma_addresses: bool,
    pub(crate) num_scanouts: u32,
    pub(crate) num_capsets: u32,
}

impl Features {
    /// Reads what [`negotiate`] has left, and logs it as the C driver does.
    pub(crate) fn new(dev: &virtio::Device<device::Bound>) -> Result<Self> {
        let offered = dev.config_read_le32(config::NUM_SCANOUTS)?;
        let bit = *module_parameters::freezing_bit.value_ref();
        let num_scanouts = offered.min(uapi::MAX_SCANOUTS as u32);
        let features = Self {
            edid: num_scanouts > 0 && dev.has_feature(feature::EDID),
            indirect: dev.has_feature(feature::INDIRECT_DESC),
            freezing: is_freezing_bit(bit) && dev.has_feature(bit),
            dma_addresses: dev.uses_dma_addresses(),
            num_scanouts,
            num_capsets: dev.config_read_le32(config::NUM_CAPSETS)?,
        };
        let dev = dev.parent();

        dev_info!(
            dev,
            "[drm] features: -virgl {}edid -resource_blob -host_visible\n",
            if features.edid { '+' } else { '-' }
        );
        dev_info!(dev, "[drm] features: -context_init -blob_alignment\n");
        if !is_freezing_bit(bit) {
            dev_warn!(
                dev,
                "[drm] freezing_bit={} is not such a bit, ignored\n",
                bit
            );
        }
        if num_scanouts == 0 {
            dev_info!(dev, "[drm] KMS disabled\n");
        } else {
            dev_info!(dev, "[drm] number of scanouts: {}\n", num_scanouts);
        }
        if offered > num_scanouts {
            dev_warn!(
                dev,
                "[drm] the host offers {} scanouts, {} are used\n",
                offered,
                num_scanouts
            );
        }
        dev_info!(dev, "[drm] number of cap sets: {}\n", features.num_capsets);
        Ok(features)
    }
}

#[kunit_tests(virtgpu_rs_features)]
mod tests {
    use super::*;

    fn auto(blob: bool, config_len: Option<usize>, alignment: u32) -> bool {
        bit5_is_freezing(Override::Auto, blob, config_len, || Ok(alignment))
    }

    #[test]
    fn bit_5_without_blobs_is_freezing() {
        assert!(auto(false, Some(20), 4096));
        assert!(auto(false, None, 4096));
    }

    #[test]
    fn bit_5_without_room_for_an_alignment_is_freezing() {
        let read = || -> Result<u32> { panic!("read past the end of the config space") };

        assert!(bit5_is_freezing(Override::Auto, true, Some(16), read));
        assert!(bit5_is_freezing(Override::Auto, true, Some(19), read));
    }

    #[test]
    fn bit_5_with_an_alignment_is_the_alignment() {
        for alignment in [1 << 12, 1 << 16, 1 << 30] {
            assert!(!auto(true, Some(20), alignment));
            assert!(!auto(true, None, alignment));
        }
        for alignment in [0, 1, 1 << 11, 1 << 31, 4097, 0x3000, u32::MAX] {
            assert!(auto(true, Some(20), alignment));
        }
        assert!(bit5_is_freezing(Override::Auto, true, None, || Err(EINVAL)));
    }

    #[test]
    fn the_administrator_knows_better() {
        let read = || -> Result<u32> { panic!("nothing is to be read") };

        assert!(bit5_is_freezing(Override::Always, true, Some(20), read));
        assert!(!bit5_is_freezing(Override::Never, false, Some(16), read));
    }

    #[test]
    fn freezing_is_on_no_bit_that_means_something_else() {
        for bit in [0, 1, 3, 24, 28, 32, 40, u32::MAX] {
            assert!(!is_freezing_bit(bit));
        }
        assert!(is_freezing_bit(5));
        assert!(is_freezing_bit(6));
        assert!(is_freezing_bit(23));
    }

    #[test]
    fn the_parameter_has_three_values() {
        assert_eq!(Override::from(0), Override::Never);
        assert_eq!(Override::from(1), Override::Always);
        assert_eq!(Override::from(-1), Override::Auto);
        assert_eq!(Override::from(2), Override::Auto);
    }
}

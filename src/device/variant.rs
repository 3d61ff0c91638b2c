//! Which of the variants of its kernels a device uses.

/// What kind of device the kernels are laid out for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Target {
    /// Wide devices: many lanes work on one row, and meet in workgroup memory.
    Wide,
    /// Software drivers, where a barrier costs more than a row: one lane works on one row, and registers take the place
    /// of workgroup memory.
    Serial,
}

/// Which of the variants of its kernels a [`Context`](super::Context) uses. All give the same choices, and outputs equal within rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Variant {
    /// Layout of the work.
    pub target: Target,
    /// Use subgroup operations (`Features::SUBGROUP`).
    pub subgroups: bool,
}

impl Target {
    pub(crate) const ALL: [Self; 2] = [Self::Wide, Self::Serial];
}

impl Variant {
    /// Every variant there is, whatever the device.
    pub(crate) const EVERY: [Self; 4] = [
        Self { target: Target::Wide, subgroups: false },
        Self { target: Target::Wide, subgroups: true },
        Self { target: Target::Serial, subgroups: false },
        Self { target: Target::Serial, subgroups: true },
    ];

    /// The one that runs everywhere: no optional feature, within WebGPU's default limits.
    pub const PORTABLE: Self = Self { target: Target::Wide, subgroups: false };

    /// The one this device is likely to be fastest with, by its adapter's type and its features.
    ///
    /// In a browser that is never one with subgroups. Browsers have the feature `subgroups`, but the web backend of wgpu 30 maps
    /// no feature to it, neither of the adapter nor in a request, so no device made through wgpu has [`wgpu::Features::SUBGROUP`].
    pub fn best(device: &wgpu::Device) -> Self {
        let cpu = device.adapter_info().device_type == wgpu::DeviceType::Cpu;
        Self {
            target: if cpu { Target::Serial } else { Target::Wide },
            subgroups: device.features().contains(wgpu::Features::SUBGROUP),
        }
    }

    /// Every variant this device can run.
    pub fn all(device: &wgpu::Device) -> Vec<Self> {
        let subgroups: &[bool] = if device.features().contains(wgpu::Features::SUBGROUP) {
            &[false, true]
        } else {
            &[false]
        };
        [Target::Wide, Target::Serial]
            .into_iter()
            .flat_map(|target| subgroups.iter().map(move |&subgroups| Self { target, subgroups }))
            .collect()
    }
}

//! Which of the variants of its kernels a device uses.
use super::MatrixUnits;

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
    /// Use matrix units for experts of many rows, where the engine hands them over
    /// ([`MatrixUnits`](super::MatrixUnits)) and they pass the check.
    #[cfg_attr(feature = "serde", serde(default))]
    pub matrix: bool,
}

impl Target {
    pub(crate) const ALL: [Self; 2] = [Self::Wide, Self::Serial];
}

impl Variant {
    /// Every variant there is, whatever the device.
    pub(crate) const EVERY: [Self; 4] = [
        Self { target: Target::Wide, subgroups: false, matrix: false },
        Self { target: Target::Wide, subgroups: true, matrix: false },
        Self { target: Target::Serial, subgroups: false, matrix: false },
        Self { target: Target::Serial, subgroups: true, matrix: false },
    ];

    /// The one that runs everywhere: no optional feature, within WebGPU's default limits.
    pub const PORTABLE: Self = Self { target: Target::Wide, subgroups: false, matrix: false };

    /// The one this device is likely to be fastest with, by its adapter's type and its features.
    ///
    /// In a browser that is never one with subgroups. Browsers have the feature `subgroups`, but the web backend of wgpu 30 maps
    /// no feature to it, neither of the adapter nor in a request, so no device made through wgpu has [`wgpu::Features::SUBGROUP`].
    pub fn best(device: &wgpu::Device) -> Self {
        let cpu = device.adapter_info().device_type == wgpu::DeviceType::Cpu;
        Self {
            target: if cpu { Target::Serial } else { Target::Wide },
            subgroups: device.features().contains(wgpu::Features::SUBGROUP),
            matrix: device.features().contains(MatrixUnits::FEATURES),
        }
    }

    /// Every variant this device can run.
    pub fn all(device: &wgpu::Device) -> Vec<Self> {
        let all = |features| {
            let has: &[bool] =
                if device.features().contains(features) { &[false, true] } else { &[false] };
            has
        };
        let (subgroups, matrix) = (all(wgpu::Features::SUBGROUP), all(MatrixUnits::FEATURES));
        let mut found = vec![];
        for target in Target::ALL.into_iter() {
            for &subgroups in subgroups {
                found.extend(matrix.iter().map(|&matrix| Self { target, subgroups, matrix }));
            }
        }
        found
    }
}

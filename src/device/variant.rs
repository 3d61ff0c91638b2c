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

/// How the matmul of many rows on wide devices lays a tile out: rows of the tile, and which of them a lane has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum TileShape {
    /// 64 rows; a lane has eight neighbours.
    #[default]
    Large,
    /// 64 rows; a lane has four of either half, so that subgroups of 64 lanes pay for up to 48 rows only as many
    /// multiply-adds as 48 take, not 64.
    Halves,
    /// 32 rows, four a lane: half the registers, for devices where those are what limits the lanes at work.
    Small,
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
    /// Tiles of the matmul of many rows. No property of a device tells which is the fastest:
    /// [`tune`](crate::measure::tune) measures them.
    #[cfg_attr(feature = "serde", serde(default))]
    pub tile: TileShape,
    /// On [`Target::Wide`]: items and a kernel of their own for what an expert has left of 9 to 32 rows, and loops of their own
    /// for up to 4. Off, more than 8 rows are a tile, however few it has. For GPUs: the compilers of software drivers take 11 to
    /// 26 seconds for one such kernel.
    #[cfg_attr(feature = "serde", serde(default))]
    pub small_items: bool,
}

impl TileShape {
    pub(crate) const ALL: [Self; 3] = [Self::Large, Self::Halves, Self::Small];

    /// The one for subgroups of up to so many lanes.
    fn of_subgroups(lanes: u32) -> Self {
        if lanes >= 64 { Self::Halves } else { Self::Large }
    }
}

impl Target {
    pub(crate) const ALL: [Self; 2] = [Self::Wide, Self::Serial];
}

impl Variant {
    /// Every layout, with subgroups and without, whatever the device; of tiles and items the portable ones.
    pub(crate) const EVERY: [Self; 4] = [
        Self::PORTABLE,
        Self { subgroups: true, ..Self::PORTABLE },
        Self { target: Target::Serial, ..Self::PORTABLE },
        Self { target: Target::Serial, subgroups: true, ..Self::PORTABLE },
    ];

    /// The one that runs everywhere: no optional feature, within WebGPU's default limits, and no kernel that a software driver
    /// compiles for long.
    pub const PORTABLE: Self = Self {
        target: Target::Wide,
        subgroups: false,
        matrix: false,
        tile: TileShape::Large,
        small_items: false,
    };

    /// The one this device is likely to be fastest with, by its adapter's type and its features.
    ///
    /// In a browser that is never one with subgroups. Browsers have the feature `subgroups`, but the web backend of wgpu 30 maps
    /// no feature to it, neither of the adapter nor in a request, so no device made through wgpu has [`wgpu::Features::SUBGROUP`].
    pub fn best(device: &wgpu::Device) -> Self {
        let info = device.adapter_info();
        let cpu = info.device_type == wgpu::DeviceType::Cpu;
        Self {
            target: if cpu { Target::Serial } else { Target::Wide },
            subgroups: device.features().contains(wgpu::Features::SUBGROUP),
            matrix: device.features().contains(MatrixUnits::FEATURES),
            tile: TileShape::of_subgroups(if cpu { 0 } else { info.subgroup_max_size }),
            small_items: !cpu,
        }
    }

    /// Every variant this device can run that may be the fastest. On GPUs tiles of other shapes than the likely one, and no small
    /// items, come last, once each.
    pub fn all(device: &wgpu::Device) -> Vec<Self> {
        let all = |features| {
            let has: &[bool] =
                if device.features().contains(features) { &[false, true] } else { &[false] };
            has
        };
        let best = Self::best(device);
        let (subgroups, matrix) = (all(wgpu::Features::SUBGROUP), all(MatrixUnits::FEATURES));
        let mut found = vec![];
        for target in Target::ALL.into_iter() {
            for &subgroups in subgroups {
                found.extend(matrix.iter().map(|&matrix| Self {
                    target,
                    subgroups,
                    matrix,
                    ..best
                }));
            }
        }
        // Software drivers are fastest with the other target, and compile each of these for seconds.
        if best.target == Target::Wide {
            let likely = Self { matrix: false, ..best };
            let others = TileShape::ALL.into_iter().filter(|shape| *shape != best.tile);
            found.extend(others.map(|tile| Self { tile, ..likely }));
            found.push(Self { small_items: false, ..likely });
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_by_halves_are_for_subgroups_of_64() {
        let of = TileShape::of_subgroups;
        assert_eq!(
            [0, 32, 64, 128].map(of),
            [TileShape::Large, TileShape::Large, TileShape::Halves, TileShape::Halves]
        );
    }
}

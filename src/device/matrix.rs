//! Matrix units: what the engine hands over of them, whether kernels may use them, and what became of it.
use super::Variant;

/// What an engine hands over so that kernels may use the device's matrix units: the shapes that its
/// adapter lists, and a queue for one small run that checks them.
///
/// The device must have been made with [`MatrixUnits::FEATURES`]. One of them is experimental in
/// wgpu, and to ask for it takes an `unsafe` token; [embedding](crate::embedding) says what that
/// means. Without the features, without a shape that the kernels know, or where the check fails, a
/// context uses the vector kernels, and [`Context::matrix`](super::Context::matrix) says why.
#[derive(Clone, Debug)]
pub struct MatrixUnits {
    pub(crate) shapes: Vec<wgpu::CooperativeMatrixProperties>,
    pub(crate) queue: wgpu::Queue,
    pub(crate) precision: Precision,
    pub(crate) fault: bool,
}

impl MatrixUnits {
    /// What kernels on matrix units need of a device.
    pub const FEATURES: wgpu::Features = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
        .union(wgpu::Features::SHADER_F16)
        .union(wgpu::Features::SUBGROUP);

    /// The shapes of an adapter, and a queue of the device that was made of it.
    pub fn new(adapter: &wgpu::Adapter, queue: &wgpu::Queue) -> Self {
        Self::of_shapes(adapter.cooperative_matrix_properties(), queue)
    }

    /// The same for an engine that has kept what
    /// [`Adapter::cooperative_matrix_properties`](wgpu::Adapter::cooperative_matrix_properties)
    /// said, and not the adapter.
    pub fn of_shapes(
        shapes: impl Into<Vec<wgpu::CooperativeMatrixProperties>>,
        queue: &wgpu::Queue,
    ) -> Self {
        let (shapes, queue) = (shapes.into(), queue.clone());
        Self { shapes, queue, precision: Precision::Full, fault: false }
    }

    /// The same at another precision than [`Precision::Full`].
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// For tests: the check reads one wrong value.
    #[doc(hidden)]
    #[must_use]
    pub fn with_fault(self) -> Self {
        Self { fault: true, ..self }
    }
}

/// How exact products on matrix units are. Sums are f32 in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Precision {
    /// As exact as f32: activations, and weights of types that need it, are each the sum of two
    /// f16, and what matters of their products is added up.
    #[default]
    Full,
    /// Activations and weights are rounded to f16 once, under a scale of their row.
    Half,
}

/// A shape of the matrix units that the kernels know: squares, f32 sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MatrixShape {
    /// 16 x 16 x 16, f16 inputs.
    Halves16,
    /// 8 x 8 x 8, f16 inputs.
    Halves8,
    /// 8 x 8 x 8, f32 inputs.
    Floats8,
}

impl MatrixShape {
    /// Every one.
    pub(crate) const ALL: [Self; 3] = [Self::Halves16, Self::Halves8, Self::Floats8];

    /// Rows, columns and depth of a square.
    pub fn side(self) -> u32 {
        if self == Self::Halves16 { 16 } else { 8 }
    }

    /// Whether inputs are f32.
    pub fn has_floats(self) -> bool {
        self == Self::Floats8
    }

    fn is(self, listed: &wgpu::CooperativeMatrixProperties) -> bool {
        use wgpu::CooperativeScalarType::{F16, F32};
        let sizes = [listed.m_size, listed.n_size, listed.k_size];
        let inputs = if self.has_floats() { F32 } else { F16 };
        sizes == [self.side(); 3] && listed.ab_type == inputs && listed.cr_type == F32
    }

    /// Those that are listed, the one to try first first. Whole f32 need one product where f16 need two
    /// or three.
    fn listed(listed: &[wgpu::CooperativeMatrixProperties], precision: Precision) -> Vec<Self> {
        let order = match precision {
            Precision::Full => [Self::Floats8, Self::Halves16, Self::Halves8],
            Precision::Half => [Self::Halves16, Self::Halves8, Self::Floats8],
        };
        order.into_iter().filter(|shape| listed.iter().any(|l| shape.is(l))).collect()
    }
}

impl std::fmt::Display for MatrixShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let side = self.side();
        write!(f, "{side}x{side}x{side} of {}", if self.has_floats() { "f32" } else { "f16" })
    }
}

/// Whether a context's kernels use matrix units, and why not.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MatrixReport {
    /// They do.
    InUse {
        /// The shape.
        shape: MatrixShape,
        /// The precision that was asked for.
        precision: Precision,
        /// Shapes that were tried before and failed the check, and how.
        failed: Vec<(MatrixShape, String)>,
    },
    /// The engine handed nothing over ([`MatrixUnits`]).
    NotOffered,
    /// The [`Variant`](super::Variant) leaves them out.
    NotInVariant,
    /// The device was made without these features.
    NoFeature(wgpu::Features),
    /// The adapter lists no shape that the kernels know, or has subgroups of more than 64 lanes.
    NoShape,
    /// Every shape failed the check.
    Failed(Vec<(MatrixShape, String)>),
}

impl MatrixReport {
    pub(crate) fn in_use(&self) -> Option<(MatrixShape, Precision)> {
        match *self {
            Self::InUse { shape, precision, .. } => Some((shape, precision)),
            _ => None,
        }
    }
}

impl std::fmt::Display for MatrixReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vector = "vector kernels";
        match self {
            Self::InUse { shape, precision, failed } => {
                write!(f, "matrix units, {shape}, {precision:?} precision")?;
                failed.iter().try_for_each(|(shape, why)| write!(f, "; not {shape}: {why}"))
            }
            Self::NotOffered => write!(f, "{vector}: no matrix units were handed over"),
            Self::NotInVariant => write!(f, "{vector}: the variant leaves matrix units out"),
            Self::NoFeature(missing) => write!(f, "{vector}: the device lacks {missing:?}"),
            Self::NoShape => write!(f, "{vector}: the adapter lists no shape that is known here"),
            Self::Failed(all) => {
                write!(f, "{vector}")?;
                all.iter().try_for_each(|(shape, why)| write!(f, "; {shape} fails: {why}"))
            }
        }
    }
}

/// Decides whether matrix units are used: `check` runs one tile of a shape, and says what is wrong.
pub(crate) fn decide(
    variant: Variant,
    features: wgpu::Features,
    subgroup_size: u32,
    units: Option<(&[wgpu::CooperativeMatrixProperties], Precision)>,
    mut check: impl FnMut(MatrixShape) -> Result<(), String>,
) -> MatrixReport {
    let Some((listed, precision)) = units else { return MatrixReport::NotOffered };
    if !variant.matrix {
        return MatrixReport::NotInVariant;
    }
    let missing = MatrixUnits::FEATURES.difference(features);
    if !missing.is_empty() {
        return MatrixReport::NoFeature(missing);
    }
    if subgroup_size > MOST_LANES {
        return MatrixReport::NoShape;
    }
    let mut failed = vec![];
    for shape in MatrixShape::listed(listed, precision) {
        match check(shape) {
            Ok(()) => return MatrixReport::InUse { shape, precision, failed },
            Err(why) => failed.push((shape, why)),
        }
    }
    if failed.is_empty() { MatrixReport::NoShape } else { MatrixReport::Failed(failed) }
}

/// Largest subgroups that the kernels' workgroups have enough of. (wgpu says 64 on Metal, where it
/// knows nothing; Apple's have 32.)
const MOST_LANES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::CooperativeScalarType::{F16, F32};

    fn listed(
        side: u32,
        ab_type: wgpu::CooperativeScalarType,
        cr_type: wgpu::CooperativeScalarType,
    ) -> wgpu::CooperativeMatrixProperties {
        wgpu::CooperativeMatrixProperties {
            m_size: side,
            n_size: side,
            k_size: side,
            ab_type,
            cr_type,
            saturating_accumulation: false,
        }
    }

    const WITH: Variant = Variant { matrix: true, ..Variant::PORTABLE };

    fn decided(
        features: wgpu::Features,
        shapes: &[wgpu::CooperativeMatrixProperties],
        precision: Precision,
        fails: &[MatrixShape],
    ) -> MatrixReport {
        decide(WITH, features, 32, Some((shapes, precision)), |shape| {
            if fails.contains(&shape) { Err("wrong".into()) } else { Ok(()) }
        })
    }

    #[test]
    fn what_is_missing_is_said() {
        let all = MatrixUnits::FEATURES;
        let known = [listed(16, F16, F32)];
        let never = |_| -> Result<(), String> { panic!("nothing to check") };
        assert_eq!(decide(WITH, all, 32, None, never), MatrixReport::NotOffered);
        let units = Some((known.as_slice(), Precision::Full));
        let without = Variant { matrix: false, ..WITH };
        assert_eq!(decide(without, all, 32, units, never), MatrixReport::NotInVariant);
        let subgroup = wgpu::Features::SUBGROUP;
        let missing = all.difference(subgroup);
        assert_eq!(decide(WITH, subgroup, 32, units, never), MatrixReport::NoFeature(missing));
        // Half sums, a shape that is no square, integers, and subgroups that are too large.
        let oblong = wgpu::CooperativeMatrixProperties { m_size: 8, ..known[0] };
        let integers = listed(16, wgpu::CooperativeScalarType::I32, F32);
        let unknown = [listed(16, F16, F16), oblong, integers];
        assert_eq!(decided(all, &unknown, Precision::Full, &[]), MatrixReport::NoShape);
        assert_eq!(decide(WITH, all, 128, units, never), MatrixReport::NoShape);
        assert!(MatrixReport::NoShape.to_string().starts_with("vector kernels"));
    }

    #[test]
    fn the_first_shape_that_passes_is_taken() {
        use MatrixShape::{Floats8, Halves8, Halves16};
        let all = MatrixUnits::FEATURES;
        let shapes = [listed(8, F16, F32), listed(8, F32, F32), listed(16, F16, F32)];
        for (precision, order) in [
            (Precision::Full, [Floats8, Halves16, Halves8]),
            (Precision::Half, [Halves16, Halves8, Floats8]),
        ] {
            for fail in 0..=3 {
                let failed: Vec<_> =
                    order[..fail].iter().map(|&s| (s, "wrong".to_string())).collect();
                let want = match order.get(fail) {
                    Some(&shape) => MatrixReport::InUse { shape, precision, failed },
                    None => MatrixReport::Failed(failed),
                };
                let got = decided(all, &shapes, precision, &order[..fail]);
                assert_eq!(got, want);
                assert_eq!(got.in_use().is_some(), fail < 3);
                assert_eq!(got.to_string().matches("wrong").count(), fail);
            }
        }
    }
}

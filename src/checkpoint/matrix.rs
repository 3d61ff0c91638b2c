//! Matrices of experts where they lie in tensors: stacked, fused, transposed, or parts of a wider
//! one.
use super::files::Tensor;
use super::names::{fill, is_stacked};
use super::{Checkpoint, ExpertNames, failed, fp8};
use crate::Result;
use crate::weights::{HostWeights, MatrixView, Projection};

impl Checkpoint {
    /// A tensor that is one matrix.
    pub(super) fn plain(
        &self,
        name: &str,
        matrix: [u32; 2],
        shape: &[u32],
    ) -> Result<HostWeights<'_>> {
        let tensor = self.files.tensor(name)?;
        if !same(tensor.shape, shape) {
            let reason = format!("has shape {:?}, expected {shape:?}", tensor.shape);
            return Err(failed(tensor.file, Some(name), reason));
        }
        self.view(&tensor, name, Part::of(matrix))
    }

    /// A projection among tensors of these names: of an expert among so many, or of a part of a
    /// shared FFN.
    pub(super) fn matrix(
        &self,
        names: &ExpertNames,
        layer: u32,
        expert: Option<[u32; 2]>,
        projection: Projection,
        Size { hidden, intermediate, part, at }: Size,
    ) -> Result<HostWeights<'_>> {
        let [index, count] = expert.unwrap_or_default();
        let find = |name: &str| -> Result<Found<'_>> {
            let stacked = expert.is_some() && is_stacked(name);
            let name = fill(name, layer, index);
            let tensor = self.files.tensor(&name)?;
            Ok(Found { tensor, name, stacked: stacked.then_some(count) })
        };
        let (wide, narrow) = ([intermediate, hidden], [hidden, intermediate]);
        let (found, matrix, turned) = match (names, projection) {
            (ExpertNames::Apart { gate: name, .. }, Projection::Gate)
            | (ExpertNames::Apart { up: name, .. }, Projection::Up) => {
                (find(name)?.expect(&[wide])?, wide, false)
            }
            (ExpertNames::Apart { down, .. }, Projection::Down) => {
                (find(down)?.expect(&[narrow])?, narrow, false)
            }
            (ExpertNames::Fused { gate_up, down }, _) => {
                let double = [2 * intermediate, hidden];
                let [wide, narrow_turned] = [double, narrow].map(|[rows, columns]| [columns, rows]);
                let (gate_up, down) = (find(gate_up)?, find(down)?);
                // Either shape alone may fit both ways; not both.
                gate_up.check(&[double, wide])?;
                down.check(&[narrow, narrow_turned])?;
                let turned = gate_up.is(wide) && down.is(narrow_turned);
                let both = if turned { [wide, narrow_turned] } else { [double, narrow] };
                if !gate_up.is(both[0]) || !down.is(both[1]) {
                    let reason = format!(
                        "has shape {:?}, which does not go with {:?} of `{}`",
                        down.tensor.shape, gate_up.tensor.shape, gate_up.name
                    );
                    return Err(failed(down.tensor.file, Some(&down.name), reason));
                }
                match projection {
                    Projection::Down => (down, narrow, turned),
                    Projection::Gate | Projection::Up => (gate_up, double, turned),
                }
            }
        };
        let fused_up = matches!(names, ExpertNames::Fused { .. }) && projection == Projection::Up;
        let (start, shape) = match projection {
            Projection::Down => ([0, at], [hidden, part]),
            _ => ([at + if fused_up { intermediate } else { 0 }, 0], [part, hidden]),
        };
        let stack = found.stacked.map(|count| [index, count]);
        let part = Part { stack, whole: matrix, start, shape, turned };
        self.view(&found.tensor, &found.name, part)
    }

    /// A matrix of a tensor.
    fn view<'a>(&'a self, tensor: &Tensor<'a>, name: &str, part: Part) -> Result<HostWeights<'a>> {
        let Part { stack, whole, start, shape, turned } = part;
        let weight_type = tensor.weight_type(name)?;
        let [rows, columns] = whole.map(u64::from);
        let strides = if turned { [1, rows] } else { [columns, 1] };
        let before = stack.map_or(0, |[index, _]| u64::from(index) * rows * columns);
        let from = before + u64::from(start[0]) * strides[0] + u64::from(start[1]) * strides[1];
        let bytes = |at: u64| {
            usize::try_from(at).ok().and_then(|at| tensor.bytes.get(at..)).unwrap_or_default()
        };
        let view = if tensor.dtype == fp8::DTYPE {
            let scales = fp8::scales(&self.files, tensor, name, &part)?;
            MatrixView::with_tile_scales(bytes(from), shape, strides, scales)
        } else {
            let block = weight_type.block_values();
            let cut = |n: u32| !n.is_multiple_of(block);
            if !turned && shape[1] != whole[1] && (cut(start[1]) || cut(shape[1])) {
                let reason = format!(
                    "is {}: the {} of {} values of a row that are one shared expert's are no whole \
                     blocks of {block}",
                    tensor.dtype, shape[1], whole[1]
                );
                return Err(failed(tensor.file, Some(name), reason));
            }
            let at = from / u64::from(block) * weight_type.block_bytes();
            MatrixView::new(bytes(at), weight_type, shape, strides)
        };
        view.map(HostWeights::View).map_err(|e| failed(tensor.file, Some(name), e.to_string()))
    }
}

/// Which matrix of a tensor: `shape` values from `start` on of a matrix `whole`, transposed or not,
/// and of which of how many that are stacked.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) stack: Option<[u32; 2]>,
    pub(super) whole: [u32; 2],
    pub(super) start: [u32; 2],
    pub(super) shape: [u32; 2],
    turned: bool,
}

impl Part {
    fn of(whole: [u32; 2]) -> Self {
        Self { stack: None, whole, start: [0; 2], shape: whole, turned: false }
    }
}

/// Sizes of the tensors of an FFN, and which part of its intermediate size is meant.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) hidden: u32,
    pub(super) intermediate: u32,
    pub(super) part: u32,
    pub(super) at: u32,
}

/// A tensor by its name, and how many experts it has a matrix of, where it is stacked.
struct Found<'a> {
    tensor: Tensor<'a>,
    name: String,
    stacked: Option<u32>,
}

impl Found<'_> {
    fn shape(&self, matrix: [u32; 2]) -> Vec<u32> {
        self.stacked.into_iter().chain(matrix).collect()
    }

    fn is(&self, matrix: [u32; 2]) -> bool {
        same(self.tensor.shape, &self.shape(matrix))
    }

    fn check(&self, any: &[[u32; 2]]) -> Result<()> {
        if any.iter().any(|&matrix| self.is(matrix)) {
            return Ok(());
        }
        let want: Vec<_> = any.iter().map(|&matrix| format!("{:?}", self.shape(matrix))).collect();
        let reason = format!("has shape {:?}, expected {}", self.tensor.shape, want.join(" or "));
        Err(failed(self.tensor.file, Some(&self.name), reason))
    }

    fn expect(self, any: &[[u32; 2]]) -> Result<Self> {
        self.check(any).map(|()| self)
    }
}

pub(super) fn same(shape: &[usize], want: &[u32]) -> bool {
    shape.len() == want.len() && shape.iter().zip(want).all(|(&n, &w)| n as u64 == u64::from(w))
}

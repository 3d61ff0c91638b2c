//! Gradients of weights: for each expert the sum, over its slots, of outer products of two rows.
//!
//! | of | sum over the slots s of e | shape |
//! |---|---|---|
//! | [`Of::Down`] | `dWdown[e] = dy[token_of[s]] (x) hg[s]` | `[D, F]` |
//! | [`Of::GateUp`] | `dWgate[e], dWup[e] = dz[s, ..F], dz[s, F..] (x) x[token_of[s]]` | `[F, D]` each |
//! | [`Dense`] | `dW = a^T b`, over all rows: a router's, by the gradient of its logits and `x` | `[E, D]` |
//!
//! Every page of the gradients is one dispatch. The sums of an expert are taken over its slots in one
//! fixed order, so that bits are equal from run to run. An expert without slots gets zeros where gradients
//! are written, and is left alone where they are added to.
use super::matmul_register::Features;
use super::matrix_tiling::Units;
use super::transposed_kernels::lanes;
use super::{not_zero, weight_gradient_matrix, weight_gradient_register, weight_gradient_tile};
use crate::device::shader::{Binding, Piece, Prelude, params, piece, read, read_uniform, write};
use crate::device::{Kernel, quirks};
use crate::error::expect_rows;
use crate::plan::HostPlan;
use crate::weights::{ExpertGradients, ExpertShape, Projection};
use crate::{BoundOp, Context, Error, PlanShape, Result, Slice, Target};
use std::ops::Range;
use std::sync::Arc;

params! {
    rows: u32, columns: u32, a_stride: u32, a_first: u32, b_stride: u32, first_expert: u32, experts: u32, slots: u32,
    expert_offsets: u32, token_of: u32, across: u32, down: u32, add: u32,
}

impl Params {
    pub(super) const FIELDS: &[(&str, u32)] = Self::LAYOUT;
}

/// Bindings of all kernels.
pub(super) const BINDINGS: &[Binding] =
    &[read("a", 4), read("b", 4), read_uniform("plan", 4), write("out", 4)];

/// What is known when a kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Problem {
    /// Which rows are the slots' tokens: of a, of b; neither where all rows are one expert's.
    pub(super) gather: Option<Side>,
    /// Largest of 8, 4, 1 that divides what is loaded side by side.
    pub(super) lanes: u32,
}

/// One of the two factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Side {
    A,
    B,
}

/// A kernel that serves a problem.
#[derive(Clone, Copy)]
enum Serving {
    Register,
    Tile,
    Matrix(Units),
}

impl Problem {
    pub(super) fn all() -> Vec<Self> {
        let sides = [Some(Side::A), Some(Side::B), None];
        sides.into_iter().flat_map(|gather| [1, 4, 8].map(|lanes| Self { gather, lanes })).collect()
    }

    pub(super) fn variants(prelude: impl Fn(&Self) -> Prelude) -> Vec<Prelude> {
        Prelude::distinct(Self::all().iter().map(prelude))
    }

    pub(super) fn label(&self) -> String {
        let of = match self.gather {
            Some(Side::A) => "by tokens of a",
            Some(Side::B) => "by tokens of b",
            None => "dense",
        };
        format!("{of}, vectors of {}", self.lanes)
    }

    /// The constants that all kernels read.
    pub(super) fn constants(&self, prelude: Prelude) -> Prelude {
        prelude
            .flag("DENSE", self.gather.is_none())
            .flag("GATHER_A", self.gather == Some(Side::A))
            .flag("GATHER_B", self.gather == Some(Side::B))
    }

    /// Loads and stores of four values, for the kernels of GPUs.
    pub(super) fn fours(&self) -> Piece {
        if self.lanes == 4 {
            piece!("gradient/fours_vec4")
        } else {
            piece!("gradient/fours_scalar")
        }
    }

    fn serving(&self, ctx: &Context) -> Serving {
        match (Units::in_use(ctx), ctx.variant().target) {
            (Some(units), _) if weight_gradient_matrix::serves(self) => Serving::Matrix(units),
            (_, Target::Serial) => Serving::Register,
            (_, Target::Wide) => Serving::Tile,
        }
    }

    fn kernel(&self, ctx: &Context) -> Result<Arc<Kernel>> {
        match self.serving(ctx) {
            Serving::Register => {
                let prelude = weight_gradient_register::prelude(self, Features::of(ctx));
                ctx.kernel(&weight_gradient_register::SPEC, prelude)
            }
            Serving::Tile => {
                ctx.kernel(&weight_gradient_tile::SPEC, weight_gradient_tile::prelude(self))
            }
            Serving::Matrix(units) => {
                let prelude = weight_gradient_matrix::prelude(self, units);
                ctx.kernel(&weight_gradient_matrix::SPEC, prelude)
            }
        }
    }

    /// Rows and columns that one workgroup makes.
    fn group(&self, ctx: &Context) -> [u32; 2] {
        match self.serving(ctx) {
            Serving::Register => weight_gradient_register::GROUP,
            Serving::Tile => weight_gradient_tile::GROUP,
            Serving::Matrix(units) => weight_gradient_matrix::group(units),
        }
    }

    /// Fails where one lane's loop over so many slots is too long for a software driver.
    fn check_loops(&self, ctx: &Context, slots: u32) -> Result<()> {
        // Steps of eight slots, for each stretch of 64 columns.
        let steps = |stretches: u32| u64::from(stretches) * (2 + u64::from(slots.div_ceil(8)));
        let iterations = match self.serving(ctx) {
            Serving::Register => steps(weight_gradient_register::GROUP[1] / 64),
            Serving::Tile => steps(1),
            Serving::Matrix(units) => weight_gradient_matrix::iterations(units, slots),
        };
        quirks::check_loops(ctx, "tokens", slots, iterations)
    }
}

/// The two factors of the gradients of a layer's experts. All f32.
#[derive(Clone, Copy, Debug)]
pub enum Of<'a> {
    /// Of down.
    Down {
        /// `[tokens, D]`: the gradient of the layer's output, read.
        dy: Slice<'a>,
        /// `[slots, F]`: gate times activation, read.
        hg: Slice<'a>,
    },
    /// Of gate and up.
    GateUp {
        /// `[slots, 2F]`: the gradient of the pre-activation, gate's before up's, read.
        dz: Slice<'a>,
        /// `[tokens, D]`: the layer's input, read.
        x: Slice<'a>,
    },
}

/// Buffers of one pass over a plan's slots.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// What is multiplied.
    pub of: Of<'a>,
    /// A plan of the shape, read; in a buffer that is not written.
    pub plan: Slice<'a>,
    /// The gradients, of the plan's experts, shared ones included.
    pub out: &'a ExpertGradients,
    /// Whether gradients are added to, rather than written: over the parts of a batch.
    pub add: bool,
}

/// Gradients of the experts' weights.
#[derive(Clone, Debug)]
pub struct WeightGradient {
    ctx: Context,
}

impl WeightGradient {
    /// Compiles the kernels for experts of this shape.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses a kernel.
    pub fn new(ctx: &Context, shape: &ExpertShape) -> Result<Self> {
        let lanes = lanes(shape.hidden).min(lanes(shape.intermediate));
        for gather in [Side::A, Side::B] {
            Problem { gather: Some(gather), lanes }.kernel(ctx)?;
        }
        Ok(Self { ctx: ctx.clone() })
    }

    /// All slots of a plan: a dispatch for each page of the gradients.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], gradients of other experts than the plan's, or a slice that does not
    /// fit ([`Error`]).
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        let at = shape.sections()?;
        let of = args.out.shape();
        let all = shape.all_experts();
        if of.experts != all {
            let reason = format!("of {} experts, the plan has {all}", of.experts);
            return Err(Error::invalid("out", reason));
        }
        args.plan.u32s("plan", &[at.words.into()])?;
        let (tokens, slots) = (u64::from(shape.tokens), u64::from(shape.slots()?));
        let [hidden, intermediate] = [of.hidden, of.intermediate];
        let [d, f] = [hidden, intermediate].map(u64::from);
        let projections: &[(Projection, u32)] = match args.of {
            Of::Down { dy, hg } => {
                dy.f32s("dy", &[tokens, d])?;
                hg.f32s("hg", &[slots, f])?;
                &[(Projection::Down, 0)]
            }
            Of::GateUp { dz, x } => {
                dz.f32s("dz", &[slots, 2 * f])?;
                x.f32s("x", &[tokens, d])?;
                &[(Projection::Gate, 0), (Projection::Up, intermediate)]
            }
        };
        let lanes = lanes(hidden).min(lanes(intermediate));
        let (a, a_stride, b, b_stride, gather) = match args.of {
            Of::Down { dy, hg } => (dy, hidden, hg, intermediate, Side::A),
            Of::GateUp { dz, x } => (dz, 2 * intermediate, x, hidden, Side::B),
        };
        let problem = Problem { gather: Some(gather), lanes };
        // An expert has each token once.
        problem.check_loops(&self.ctx, shape.tokens)?;
        let mut step = BoundOp::default();
        for &(projection, a_first) in projections {
            let pages = args.out.pages(projection);
            for (index, page) in pages.iter().enumerate() {
                let params = Params {
                    a_stride,
                    a_first: a_first + page.rows.start,
                    b_stride,
                    columns: of.matrix(projection)[1],
                    expert_offsets: at.expert_offsets,
                    token_of: at.token_of,
                    add: args.add.into(),
                    ..Params::default()
                };
                let out = (&page.buffer).into();
                let slices = [a, b, args.plan, out];
                let page = (page.experts.clone(), page.rows.clone());
                let dispatch = dispatch(&self.ctx, problem, params, page, slices)?;
                let stage = match projection {
                    Projection::Gate => "gate",
                    Projection::Up => "up",
                    Projection::Down => "down",
                };
                let dispatch = dispatch.of_stage(stage).of_page("all", index, pages.len());
                step = step.then(dispatch.into());
            }
        }
        Ok(step)
    }
}

/// One page: some experts, some of the rows of their matrices.
fn dispatch(
    ctx: &Context,
    problem: Problem,
    params: Params,
    (experts, rows): (Range<u32>, Range<u32>),
    slices: [Slice<'_>; 4],
) -> Result<crate::Dispatch> {
    let [height, width] = problem.group(ctx);
    let params = Params {
        rows: rows.end - rows.start,
        first_expert: experts.start,
        experts: experts.end - experts.start,
        across: params.columns.div_ceil(width),
        down: (rows.end - rows.start).div_ceil(height),
        ..params
    };
    // The last of a matrix's pages may have rows that are no multiple of 8.
    let lanes = problem.lanes.min(lanes(params.rows));
    let groups = [params.experts, params.across, params.down].map(u64::from);
    let kernel = Problem { lanes, ..problem }.kernel(ctx)?;
    kernel.dispatch(ctx, &params, &slices, groups.into_iter().product())
}

/// Buffers of one dense product. All f32.
#[derive(Clone, Copy, Debug)]
pub struct DenseArgs<'a> {
    /// `[tokens, rows]`, read.
    pub a: Slice<'a>,
    /// `[tokens, columns]`, read.
    pub b: Slice<'a>,
    /// `[rows, columns]`, written, or added to.
    pub out: Slice<'a>,
    /// Whether `out` is added to.
    pub add: bool,
}

/// `a^T b` over all rows.
#[derive(Clone, Debug)]
pub struct Dense {
    ctx: Context,
    matrix: [u32; 2],
    problem: Problem,
}

impl Dense {
    /// Compiles the kernel for a matrix of `rows` by `columns`: a router's experts by D.
    ///
    /// # Errors
    ///
    /// Zero sizes; [`Error::Device`] where wgpu refuses the kernel.
    pub fn new(ctx: &Context, rows: u32, columns: u32) -> Result<Self> {
        not_zero(&[("rows", rows), ("columns", columns)])?;
        let problem = Problem { gather: None, lanes: lanes(rows).min(lanes(columns)) };
        problem.kernel(ctx)?;
        Ok(Self { ctx: ctx.clone(), matrix: [rows, columns], problem })
    }

    /// The sum over `tokens` rows: zeros, or nothing added, where there are none.
    ///
    /// # Errors
    ///
    /// A slice that does not fit ([`Error`]).
    pub fn bind(&self, tokens: u32, args: DenseArgs<'_>) -> Result<BoundOp> {
        let [rows, columns] = self.matrix;
        self.problem.check_loops(&self.ctx, tokens)?;
        args.a.f32s("a", &[tokens.into(), rows.into()])?;
        args.b.f32s("b", &[tokens.into(), columns.into()])?;
        args.out.f32s("out", &[rows.into(), columns.into()])?;
        let params = Params {
            a_stride: rows,
            b_stride: columns,
            columns,
            slots: tokens,
            add: args.add.into(),
            ..Params::default()
        };
        let nothing = self.ctx.nothing();
        // Bindings of no rows would be of no bytes.
        let [a, b] = if tokens == 0 { [nothing; 2] } else { [args.a, args.b] };
        let slices = [a, b, nothing, args.out];
        let dispatch = dispatch(&self.ctx, self.problem, params, (0..1, 0..rows), slices)?;
        Ok(dispatch.of_stage("dense").into())
    }
}

/// The CPU twin of one expert: `[rows, columns]`, the sum of the outer products of some rows of
/// `a [.., rows]` and of `b [.., columns]`, in f64 rounded once.
///
/// # Panics
///
/// If `rows` or `columns` is 0, or if `a` or `b` is not whole rows; the message names the argument.
pub fn cpu_outer(
    a: &[f32],
    b: &[f32],
    [rows, columns]: [usize; 2],
    pairs: impl Iterator<Item = [usize; 2]>,
) -> Vec<f32> {
    expect_rows("a", a.len(), "rows", rows);
    expect_rows("b", b.len(), "columns", columns);
    let mut sums = vec![0f64; rows * columns];
    for [i, j] in pairs {
        for (n, sums) in sums.chunks_exact_mut(columns).enumerate() {
            for (k, sum) in sums.iter_mut().enumerate() {
                *sum += f64::from(a[i * rows + n]) * f64::from(b[j * columns + k]);
            }
        }
    }
    sums.into_iter().map(|v| v as f32).collect()
}

/// The CPU twin: the sum of each of the plan's experts, `[rows, columns]`. `a_is_gathered` says whether
/// the rows of `a` are tokens and those of `b` slots, or the other way round.
///
/// # Panics
///
/// As [`cpu_outer`].
pub fn cpu(
    plan: &HostPlan,
    a: &[f32],
    b: &[f32],
    matrix: [usize; 2],
    a_is_gathered: bool,
) -> Vec<Vec<f32>> {
    let of_expert = |offsets: &[u32]| {
        let pairs = (offsets[0]..offsets[1]).map(|s| {
            let (slot, token) = (s as usize, plan.token_of[s as usize] as usize);
            if a_is_gathered { [token, slot] } else { [slot, token] }
        });
        cpu_outer(a, b, matrix, pairs)
    };
    plan.expert_offsets.windows(2).map(of_expert).collect()
}

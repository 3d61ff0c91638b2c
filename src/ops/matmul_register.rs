//! The grouped matmul for CPU-type devices: all in registers. See [`grouped_matmul`](super::grouped_matmul).
use super::matmul_kernels::{
    BINDINGS, ItemKind, Layout, MatmulKernel, Params, SKINNY_ROWS, Specialization,
};
use super::matmul_pieces as pieces;
use crate::device::shader::{Prelude, Spec, piece};
use crate::{Context, FloatType, Target};

/// See `shaders/matmul_register.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_register",
    body: include_str!("../../shaders/matmul_register.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        Prelude::distinct(
            Specialization::all()
                .iter()
                .filter(|problem| problem.kind != ItemKind::Small)
                .flat_map(|problem| Features::ALL.map(|features| prelude(problem, features))),
        )
    },
};

/// Its row of the table.
pub(crate) const KERNEL: MatmulKernel = MatmulKernel {
    spec: &SPEC,
    serves: |ctx, work| ctx.variant().target == Target::Serial && work.kind != ItemKind::Small,
    tile_rows: |_| TILE_ROWS,
    prelude: |ctx, problem| prelude(problem, Features::of(ctx)),
    group: |_, problem| group_tile(problem),
    item_step,
    iterations,
};

/// Lanes of a workgroup: one subgroup.
const WG: u32 = 8;

/// Rows of a tile item. 32 were 0 to 10 % faster and took two to three times as long to compile.
pub(crate) const TILE_ROWS: u32 = 16;

/// Stretches of columns, and items, that a workgroup takes one after the other. Tiles of one expert read the same weights:
/// taken in turn, a cache still holds those of one stretch (f32: 512 KiB at a depth of 2,048).
/// (Two stretches: W2 2 % faster, OP2 3 to 7 % slower.)
pub(super) fn span(kind: ItemKind, dense: bool) -> [u32; 2] {
    match kind {
        ItemKind::Skinny => [4, 1],
        _ if dense => [1, 1],
        _ => [1, 4],
    }
}

/// A run of blocks is a loop of four steps in the loop over runs.
fn iterations(problem: &Specialization, depth: u32) -> u64 {
    let [span, items] = span(problem.kind, problem.dense).map(u64::from);
    let steps = u64::from(depth.div_ceil(8));
    let runs = if problem.weight_type.has_blocks() { depth.div_ceil(32) } else { 0 };
    items * (1 + span * (1 + steps + u64::from(runs)))
}

/// What the device has that this kernel can use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    /// 64-bit loads and stores: a software driver pays by their components, not by their bytes.
    pub(crate) wide: bool,
    /// Subgroups of at least 8 lanes: rows are loaded once and handed round.
    pub(crate) shuffle: bool,
}

impl Features {
    pub(super) const ALL: [Self; 4] = [
        Self { wide: false, shuffle: false },
        Self { wide: false, shuffle: true },
        Self { wide: true, shuffle: false },
        Self { wide: true, shuffle: true },
    ];

    pub(crate) fn of(ctx: &Context) -> Self {
        Self {
            wide: ctx.device().features().contains(wgpu::Features::SHADER_INT64),
            // A workgroup of 8 lanes is then one subgroup, in the order of its lanes.
            shuffle: ctx.variant().subgroups && ctx.info().subgroup_min_size >= WG,
        }
    }
}

/// Rows of an item.
fn rows(problem: &Specialization) -> u32 {
    if problem.kind == ItemKind::Skinny { SKINNY_ROWS } else { TILE_ROWS }
}

/// Columns and items that one workgroup makes.
pub(crate) fn group_tile(problem: &Specialization) -> [u32; 2] {
    let [span, items] = span(problem.kind, problem.dense);
    [span * WG * if problem.activation.is_some() { 4 } else { 8 }, items]
}

/// The step between groups of items that follow one another, modulo their number, with which it has no divisor in common.
/// llvmpipe gives each of its threads one run of workgroups; of a bounded grid the items that exist come first, so that some
/// threads would have more of them than others. Columns vary slowest for the same reason.
pub(crate) fn item_step(groups: u32) -> u32 {
    let coprime = |step: &u32| {
        let (mut a, mut b) = (*step, groups);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    // Near the golden section, which spreads any run evenly. The product of place and step must fit 32 bits.
    if groups <= 1 << 16 { (groups * 5 / 8..groups).find(coprime).unwrap_or(1) } else { 1 }
}

pub(crate) fn prelude(problem: &Specialization, features: Features) -> Prelude {
    let wide_out = features.wide && problem.quad_columns;
    let problem = problem.with_lanes_of_halves();
    let problem = &if wide_out { problem } else { problem.with_any_stores() };
    let Specialization { layout, weight_type, depth_lanes, .. } = *problem;
    // 64-bit loads take two 16-byte words: of neighbouring columns (packed), or neighbours in a row.
    let wide_weights = features.wide
        && match layout {
            Layout::Packed => true,
            Layout::Rows => weight_type.device_depth() == 4 && depth_lanes % 8 == 0,
            Layout::AnyRows => false,
        };
    let wide_x = features.wide && depth_lanes % 8 == 0 && problem.x_type == FloatType::F32;
    let mut prelude = Prelude::new(problem.label());
    if wide_weights || wide_x || wide_out {
        prelude.label += ", 64-bit loads and stores";
        prelude = prelude.needs(wgpu::Features::SHADER_INT64);
    }
    if features.shuffle {
        prelude.label += ", shuffled rows";
        prelude = prelude.needs(wgpu::Features::SUBGROUP);
    }
    problem
        .constants(prelude)
        .constant("WG", WG)
        .constant("SPAN", span(problem.kind, problem.dense)[0])
        .constant("ITEMS", span(problem.kind, problem.dense)[1])
        .constant("TILE_ROWS", rows(problem))
        // Whether a row holds an even number of 16-byte words, so that steps of eight values are whole.
        .flag("WHOLE_STEPS", weight_type.device_depth() != 4 || depth_lanes % 8 == 0)
        .piece(piece!("common/grid"))
        .piece(piece!("matmul/params"))
        .piece(pieces::tile(problem))
        .piece(piece!("common/eight_values"))
        .maybe_piece((wide_x || wide_out).then_some(piece!("common/wide_floats")))
        .piece(piece!("matmul/register/eight"))
        .maybe_piece(pieces::halves(problem))
        .piece(pieces::eight(problem, wide_x))
        .piece(if features.shuffle {
            piece!("matmul/register/share_shuffle")
        } else {
            piece!("matmul/register/share_none")
        })
        .piece(pieces::unpack(problem))
        .maybe_piece(pieces::blocks(problem))
        .piece(pieces::layout(problem))
        .piece(if wide_weights {
            piece!("matmul/register/words_wide")
        } else {
            pieces::weights(problem)
        })
        .maybe_piece((!wide_weights).then_some(piece!("matmul/register/words_plain")))
        .piece(pieces::pair(problem))
        .piece(pieces::activation(problem))
        .piece(if wide_out {
            piece!("matmul/register/out_wide")
        } else {
            piece!("matmul/out_scalar")
        })
        .piece(piece!("matmul/register/block"))
        .piece(pieces::register_run(problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_reach_every_group_once() {
        for groups in (1..2000).chain([65_535, 65_536, 65_537, 100_000]) {
            let step = item_step(groups);
            let mut seen = vec![false; groups as usize];
            for place in 0..groups {
                // As the shader computes it, in 32 bits.
                let group = place.checked_mul(step).expect("fits") % groups;
                assert!(!std::mem::replace(&mut seen[group as usize], true), "{groups}: {group}");
            }
        }
    }

    #[test]
    fn steps_spread_the_first_groups() {
        // Of 1,000 groups the first 300 exist: each tenth of the grid has its share.
        let step = item_step(1000);
        for tenth in 0..10 {
            let exist = (tenth * 100..tenth * 100 + 100).filter(|p| p * step % 1000 < 300).count();
            assert!((25..=35).contains(&exist), "{exist}");
        }
    }
}

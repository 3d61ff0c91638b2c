//! The matmul by transposed weights for CPU-type devices: all in registers. See
//! [`matmul_transposed`](super::matmul_transposed).
use super::matmul_kernels::{ItemKind, Layout, SKINNY_ROWS};
use super::matmul_register::{Features, TILE_ROWS, span};
use super::transposed_kernels::{ALL_BINDINGS, Params, Problem};
use crate::Context;
use crate::device::shader::{Piece, Prelude, Spec, piece};

/// See `shaders/transposed_register.wgsl`.
pub const SPEC: Spec = Spec {
    name: "transposed_register",
    body: include_str!("../../shaders/transposed_register.wgsl"),
    params: Params::FIELDS,
    bindings: ALL_BINDINGS,
    variants: || {
        let of = |features| Problem::variants(|problem| prelude(problem, features));
        Prelude::distinct(Features::ALL.into_iter().flat_map(of))
    },
};

/// Lanes of a workgroup: one subgroup.
const WG: u32 = 8;

/// Columns and items that one workgroup makes.
pub(super) fn group(problem: &Problem) -> [u32; 2] {
    let [span, items] = span(problem.kind, problem.dense);
    [span * WG * 8, items]
}

/// Iterations that the loops of one invocation take at most.
pub(super) fn iterations(problem: &Problem, rows: u32) -> u64 {
    let [span, items] = span(problem.kind, problem.dense).map(u64::from);
    let matrices = if problem.gated { 2 } else { 1 };
    items * (1 + span * (1 + matrices * u64::from(rows.div_ceil(8))))
}

pub(super) fn prelude_of(ctx: &Context, problem: &Problem) -> Prelude {
    prelude(problem, Features::of(ctx))
}

fn prelude(problem: &Problem, features: Features) -> Prelude {
    let wide_out = features.wide && problem.column_lanes >= 4;
    // What lies in words is loaded by words; f32 in place by twos of them too.
    let column_lanes = match (problem.layout, problem.weight_type.device_depth()) {
        (Layout::Rows, 4) => problem.column_lanes,
        _ => 1,
    };
    let problem = &Problem { column_lanes, ..*problem };
    let Problem { layout, weight_type, row_lanes, .. } = *problem;
    // 64-bit loads take two 16-byte words: of neighbouring rows (packed), or neighbours in a row.
    let wide_weights = features.wide
        && match layout {
            Layout::Packed => true,
            Layout::Rows => weight_type.device_depth() == 4 && column_lanes == 8,
            Layout::AnyRows => false,
        };
    let wide_x = features.wide && row_lanes == 8;
    let mut prelude = Prelude::new(problem.label());
    for (wide, of) in [(wide_weights || wide_x, "loads"), (wide_out, "stores")] {
        if wide {
            prelude.label += &format!(", 64-bit {of}");
            prelude = prelude.needs(wgpu::Features::SHADER_INT64);
        }
    }
    if features.shuffle {
        prelude.label += ", shuffled rows";
        prelude = prelude.needs(wgpu::Features::SUBGROUP);
    }
    let words = match (layout, wide_weights) {
        (Layout::AnyRows, _) => [None, None],
        (_, true) => [Some(piece!("matmul/register/words_wide")), None],
        (_, false) => [piece!("matmul/weights"), piece!("matmul/register/words_plain")].map(Some),
    };
    let [run, part] = problem.blocks();
    problem
        .constants(prelude)
        .constant("WG", WG)
        .constant("SPAN", span(problem.kind, problem.dense)[0])
        .constant("ITEMS", span(problem.kind, problem.dense)[1])
        .constant(
            "TILE_ROWS",
            if problem.kind == ItemKind::Skinny { SKINNY_ROWS } else { TILE_ROWS },
        )
        .piece(piece!("common/grid"))
        .piece(piece!("matmul/transposed/sizes"))
        .piece(problem.items())
        .piece(piece!("common/eight_values"))
        .maybe_piece((wide_x || wide_out).then_some(piece!("common/wide_floats")))
        .piece(piece!("matmul/register/eight"))
        .piece(match row_lanes {
            8 if wide_x => piece!("matmul/register/eight_wide"),
            8 | 4 => piece!("matmul/register/eight_vec4"),
            _ => piece!("matmul/register/eight_scalar"),
        })
        .piece(if features.shuffle {
            piece!("matmul/register/share_shuffle")
        } else {
            piece!("matmul/register/share_none")
        })
        .piece(weight_type.unpack())
        .maybe_piece(run)
        .maybe_piece(part)
        .piece(problem.places())
        .maybe_piece(words[0])
        .maybe_piece(words[1])
        .piece(rows(problem))
        .piece(if wide_out { piece!("common/store_fours") } else { piece!("common/store_ones") })
        .piece(piece!("matmul/transposed/lane"))
}

/// Eight columns of two neighbouring rows.
fn rows(problem: &Problem) -> Piece {
    let weight_type = problem.weight_type;
    match (problem.layout, weight_type.has_blocks(), weight_type.device_depth()) {
        (Layout::AnyRows, ..) => piece!("matmul/transposed/rows_any"),
        (_, true, _) => piece!("matmul/transposed/rows_blocks"),
        (_, _, 4) => piece!("matmul/transposed/rows_f32"),
        _ => piece!("matmul/transposed/rows_halves"),
    }
}

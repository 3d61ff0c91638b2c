//! Gradients of weights against the CPU twin: experts of no slots and of many, sides of every kind, every
//! split into pages, written and added to.
use std::ops::Range;
use testkit::compare::{close, exact, largest, same};
use testkit::prelude::{Output, gpu, random, run, variant_name};
use testkit::works::plan;
use wgmoe::ops::weight_gradient::{Args, Dense, DenseArgs, Of, WeightGradient, cpu, cpu_outer};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertGradients, ExpertShape, Projection};
use wgmoe::{Context, Gpu, Target, WeightType};

/// Tokens of each expert: none, one, a whole step, a rest, many, none again.
const ROWS: [usize; 6] = [0, 1, 8, 19, 77, 0];
const TOKENS: usize = 77;

fn assigned() -> Vec<u32> {
    let mut words = bits::empty(TOKENS, ROWS.len());
    for (e, rows) in ROWS.into_iter().enumerate() {
        for i in 0..rows {
            bits::set(&mut words, TOKENS, e, (e * 7 + i * 3) % TOKENS);
        }
    }
    words
}

fn shape(hidden: u32, intermediate: u32) -> ExpertShape {
    ExpertShape::new(ROWS.len() as u32, hidden, intermediate, WeightType::F32)
}

/// Each expert's matrix, read back from its pages.
fn download(gpu: &Gpu, all: &ExpertGradients, projection: Projection) -> Vec<Vec<f32>> {
    let of_expert = |expert| {
        let mut next = 0;
        let mut values = vec![];
        for (rows, slice) in all.slices(expert, projection) {
            let Range { start, end } = rows;
            assert_eq!(start, next, "rows follow one another");
            next = end;
            values.extend(gpu.download::<f32>(slice).unwrap());
        }
        assert_eq!(next, all.shape().matrix(projection)[0], "all rows");
        values
    };
    (0..all.shape().experts).map(of_expert).collect()
}

/// A context for every kernel that there is: on GPUs subgroups make no difference here, and the kernels on
/// matrix units are the same for all.
fn contexts(gpu: &Gpu) -> Vec<Context> {
    let own = |v: wgmoe::Variant| match v.target {
        Target::Serial => !v.matrix,
        Target::Wide => v.matrix || !v.subgroups,
    };
    testkit::prelude::contexts(gpu).into_iter().filter(|ctx| own(ctx.variant())).collect()
}

/// What is multiplied.
struct Factors {
    dy: Vec<f32>,
    hg: Vec<f32>,
    dz: Vec<f32>,
    x: Vec<f32>,
}

impl Factors {
    fn new([d, f]: [usize; 2], slots: usize) -> Self {
        Self {
            dy: random(1, TOKENS * d),
            hg: random(2, slots * f),
            dz: random(3, slots * 2 * f),
            x: random(4, TOKENS * d),
        }
    }

    /// The twin of gate, up, down.
    fn twin(&self, plan: &wgmoe::plan::HostPlan, [d, f]: [usize; 2]) -> [Vec<Vec<f32>>; 3] {
        let half = |first: usize| -> Vec<f32> {
            self.dz.chunks_exact(2 * f).flat_map(|row| row[first..first + f].to_vec()).collect()
        };
        [
            cpu(plan, &half(0), &self.x, [f, d], false),
            cpu(plan, &half(f), &self.x, [f, d], false),
            cpu(plan, &self.dy, &self.hg, [d, f], true),
        ]
    }
}

/// Writes over what was there, adds to it, and both once more from the start.
fn check(gpu: &Gpu, ctx: &Context, [d, f]: [u32; 2], page_limit: u64) -> [usize; 3] {
    let logits = random(5, TOKENS * ROWS.len());
    let planned = plan(gpu, ctx, [TOKENS as u32, ROWS.len() as u32], &logits, &assigned()).unwrap();
    let slots = planned.host.token_of.len();
    let sides = [d as usize, f as usize];
    let factors = Factors::new(sides, slots);
    let want = factors.twin(&planned.host, sides);
    let [dy, hg] = [&factors.dy, &factors.hg].map(|v| gpu.upload(v));
    let [dz, x] = [&factors.dz, &factors.x].map(|v| gpu.upload(v));
    let out = ExpertGradients::with_page_limit(ctx, &shape(d, f), page_limit).unwrap();
    assert_eq!(out.bytes(), ExpertGradients::bytes_of(&shape(d, f)).unwrap());
    for buffer in out.buffers() {
        let poison = vec![f32::NAN; (buffer.size() / 4) as usize];
        gpu.queue.write_buffer(buffer, 0, bytemuck::cast_slice(&poison));
    }
    let op = WeightGradient::new(ctx, &shape(d, f)).unwrap();
    let bind = |add| {
        let plan = (&planned.plan).into();
        let down = Of::Down { dy: (&dy).into(), hg: (&hg).into() };
        let gate_up = Of::GateUp { dz: (&dz).into(), x: (&x).into() };
        let of = |of| op.bind(&planned.shape, Args { of, plan, out: &out, add }).unwrap();
        of(down).then(of(gate_up))
    };
    let what = format!("{} [{d}, {f}]", variant_name(ctx));
    let all = || Projection::ALL.map(|p| download(gpu, &out, p));
    run(gpu, &bind(false));
    let written = all();
    run(gpu, &bind(true));
    let added = all();
    for (p, projection) in Projection::ALL.into_iter().enumerate() {
        for (e, want) in want[p].iter().enumerate() {
            let what = format!("{what}: {projection:?} of expert {e}");
            let tolerance = 2e-5 * largest(want);
            close(&written[p][e], want, tolerance, 2e-5, &what).unwrap();
            let twice: Vec<f32> = want.iter().map(|v| 2.0 * v).collect();
            close(&added[p][e], &twice, 2.0 * tolerance, 2e-5, &format!("{what}, added")).unwrap();
        }
        // Zeros are written, and the same ones are left.
        assert!(ROWS[0] == 0 && exact(&written[p][0]).iter().all(|&bits| bits == 0), "{what}");
    }
    run(gpu, &bind(false));
    for (again, first) in all().iter().flatten().zip(written.iter().flatten()) {
        same(&exact(again), &exact(first), &format!("{what}: again")).unwrap();
    }
    out.page_counts()
}

#[test]
fn of_every_kind_of_sides() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for sides in [[136, 152], [132, 72], [139, 38], [8, 264]] {
            check(&gpu, &ctx, sides, u64::MAX);
        }
    }
}

#[test]
fn of_every_split_into_pages() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        // Two experts a page, one, some rows of one with a rest that is no multiple of 4.
        let matrix = 4 * 130 * 72;
        let counts = [2 * matrix, matrix, matrix / 3].map(|n| check(&gpu, &ctx, [130, 72], n));
        assert_eq!(counts[..2], [[3; 3], [6; 3]], "{counts:?}");
        assert!(counts[2].iter().all(|&n| n >= 18), "{counts:?}");
    }
}

/// One expert for all rows, and none: zeros.
#[test]
fn of_one_matrix_for_all_rows() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for [rows, columns] in [[64, 136], [37, 148], [36, 44], [1, 1]] {
            let op = Dense::new(&ctx, rows as u32, columns as u32).unwrap();
            for tokens in [0, 1, 8, 83] {
                let (a, b) = (random(1, tokens * rows), random(2, tokens * columns));
                let before = random(3, rows * columns);
                let [a_in, b_in] = [&a, &b].map(|v| gpu.upload(v));
                let sums = cpu_outer(&a, &b, [rows, columns], (0..tokens).map(|t| [t, t]));
                for add in [false, true] {
                    let out = Output::holding(&gpu, &before);
                    let [a, b] = [&a_in, &b_in].map(|b| wgmoe::Slice::new(b, 0, 0));
                    let a = wgmoe::Slice { size: 4 * (tokens * rows) as u64, ..a };
                    let b = wgmoe::Slice { size: 4 * (tokens * columns) as u64, ..b };
                    let args = DenseArgs { a, b, out: out.slice(), add };
                    run(&gpu, &op.bind(tokens as u32, args).unwrap());
                    let both = sums.iter().zip(&before);
                    let want: Vec<f32> = both.map(|(s, b)| if add { s + b } else { *s }).collect();
                    let got: Vec<f32> = out.get(&gpu);
                    let what = format!("{} {rows} {columns} {tokens}", variant_name(&ctx));
                    close(&got, &want, 2e-5 * largest(&want), 2e-5, &what).unwrap();
                }
            }
        }
    }
}

/// NaN and infinity go where they belong, and not into what a step has besides.
#[test]
fn what_is_not_finite_goes_through() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let (rows, columns, tokens) = (24, 40, 11);
        let op = Dense::new(&ctx, rows as u32, columns as u32).unwrap();
        let (mut a, mut b) = (random(1, tokens * rows), random(2, tokens * columns));
        // The last row, which stands in for those that are not there.
        a[10 * rows + 3] = f32::INFINITY;
        b[10 * columns + 5] = f32::INFINITY;
        b[4 * columns + 7] = f32::NAN;
        let [a_in, b_in] = [&a, &b].map(|v| gpu.upload(v));
        let out = Output::f32s(&gpu, rows * columns);
        let (first, second) = ((&a_in).into(), (&b_in).into());
        let args = DenseArgs { a: first, b: second, out: out.slice(), add: false };
        run(&gpu, &op.bind(tokens as u32, args).unwrap());
        let got: Vec<f32> = out.get(&gpu);
        let want = cpu_outer(&a, &b, [rows, columns], (0..tokens).map(|t| [t, t]));
        let kinds = |values: &[f32]| -> Vec<u8> {
            values.iter().map(|v| u8::from(v.is_nan()) + 2 * u8::from(v.is_infinite())).collect()
        };
        assert!(want.iter().any(|v| v.is_nan()) && want.iter().any(|v| v.is_infinite()));
        same(&kinds(&got), &kinds(&want), &variant_name(&ctx)).unwrap();
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let logits = random(5, TOKENS * ROWS.len());
    let planned =
        plan(&gpu, ctx, [TOKENS as u32, ROWS.len() as u32], &logits, &assigned()).unwrap();
    let slots = planned.host.token_of.len();
    let op = WeightGradient::new(ctx, &shape(24, 12)).unwrap();
    let dy = gpu.upload(&vec![0f32; TOKENS * 24]);
    let hg = gpu.upload(&vec![0f32; slots * 12]);
    let out = ExpertGradients::new(ctx, &shape(24, 12)).unwrap();
    let other = ExpertShape::new(5, 24, 12, WeightType::F32);
    let other = ExpertGradients::new(ctx, &other).unwrap();
    let plan = (&planned.plan).into();
    let of = Of::Down { dy: (&dy).into(), hg: (&hg).into() };
    let args = Args { of, plan, out: &out, add: false };
    assert!(op.bind(&planned.shape, args).is_ok());
    let swapped = Of::Down { dy: (&hg).into(), hg: (&dy).into() };
    for (name, args) in [
        ("out", Args { out: &other, ..args }),
        ("dy", Args { of: swapped, ..args }),
        ("plan", Args { plan: (&dy).into(), ..args }),
    ] {
        let error = op.bind(&planned.shape, args).expect_err(name).to_string();
        assert!(error.contains(name), "{name}: {error}");
    }
    let error = ExpertGradients::with_page_limit(ctx, &shape(24, 12), 100).expect_err("a page");
    assert!(error.to_string().contains("page_limit"), "{error}");
}

/// A new one holds zeros, and becomes zero again.
#[test]
fn gradients_become_zero() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let all = ExpertGradients::with_page_limit(ctx, &shape(24, 12), 1024).unwrap();
    assert!(all.page_counts().iter().all(|&n| n > ROWS.len()), "{:?}", all.page_counts());
    for buffer in all.buffers() {
        gpu.queue.write_buffer(buffer, 0, &[255; 16]);
    }
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    all.zero(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    for projection in Projection::ALL {
        assert!(download(&gpu, &all, projection).iter().flatten().all(|v| *v == 0.0));
    }
}

//! What the reference implementations returned, on the CPU twins and on the GPU in every variant. Reads every
//! `*.safetensors` of `tests/golden`, or of the folder that `WGMOE_GOLDEN` names, and goes by each file's header: its
//! `__metadata__.case` is JSON with a `kind`.
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use testkit::golden_layer::{self, Layer};
use testkit::prelude::*;
use wgmoe::ops::expert_choice::{self, ExpertChoice};
use wgmoe::ops::plan_count::{self, PlanCount, Scales};
use wgmoe::ops::scores::{self, Scores};
use wgmoe::ops::token_choice::{self, TokenChoice};
use wgmoe::plan::bits;
use wgmoe::routing::GateRule;
use wgmoe::routing::Groups;
use wgmoe::{Context, Gpu, PlanShape, Score};

/// The settings of a case: the union over kinds. A file that lacks what its kind needs fails by the setting's name.
#[derive(Deserialize)]
pub(crate) struct Case {
    pub(crate) kind: String,
    pub(crate) sequences: Option<usize>,
    pub(crate) tokens: Option<usize>,
    pub(crate) experts: Option<usize>,
    pub(crate) experts_per_token: Option<usize>,
    average_experts_per_token: Option<usize>,
    score: Option<String>,
    normalise: Option<String>,
    scope: Option<String>,
    capacity_factor: Option<f64>,
    drop: Option<String>,
    groups: Option<u32>,
    groups_per_token: Option<u32>,
    routed_scaling_factor: Option<f32>,
}

impl Case {
    fn score(&self) -> Score {
        match self.score.as_deref() {
            Some("softmax") => Score::Softmax,
            Some("sigmoid") => Score::Sigmoid,
            other => panic!("score {other:?}"),
        }
    }

    /// Whether the weights are normalised after the selection.
    fn after(&self) -> bool {
        match self.normalise.as_deref() {
            Some("after_selection") => true,
            Some("before_selection") => false,
            other => panic!("normalise {other:?}"),
        }
    }
}

/// A file: its settings and tensors.
pub(crate) struct File {
    pub(crate) path: PathBuf,
    bytes: Vec<u8>,
    pub(crate) case: Case,
}

impl File {
    pub(crate) fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let text = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get("case"))
            .expect("`case` in the header")
            .clone();
        let case =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { path: path.into(), bytes, case }
    }

    fn raw(&self, name: &str, dtype: Dtype) -> Option<Vec<u8>> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("tensors");
        let tensor = tensors.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), dtype, "{}: `{name}`", self.path.display());
        Some(tensor.data().to_vec())
    }

    pub(crate) fn f32s(&self, name: &str) -> Option<Vec<f32>> {
        Some(bytemuck::pod_collect_to_vec(&self.raw(name, Dtype::F32)?))
    }

    pub(crate) fn i32s(&self, name: &str) -> Option<Vec<i32>> {
        Some(bytemuck::pod_collect_to_vec(&self.raw(name, Dtype::I32)?))
    }

    pub(crate) fn u8s(&self, name: &str) -> Option<Vec<u8>> {
        self.raw(name, Dtype::U8)
    }

    /// A tensor that must be there.
    pub(crate) fn must<T>(&self, name: &str, tensor: Option<T>) -> T {
        tensor.unwrap_or_else(|| panic!("{}: no `{name}`", self.path.display()))
    }
}

/// Every golden file, by name.
pub(crate) fn files() -> Vec<File> {
    let folder = golden_layer::folder();
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    if paths.is_empty() {
        println!("no golden files in {}", folder.display());
    }
    paths.iter().map(|path| File::open(path)).collect()
}

/// One function a kind.
type Check = fn(&File, Option<&Gpu>, &mut Report);

const KINDS: &[(&str, Check)] = &[
    ("expert_choice", expert_choice),
    ("token_choice", token_choice),
    ("group_limited", group_limited),
    // block_coreset, block_capacity, saliency_vote, sequence_union, opportunistic, sequence_top, capacity_schedule:
    // a line and a function each.
];

/// What was compared.
#[derive(Default)]
pub(crate) struct Report {
    /// Choices that hang on values within a few ulp of each other and fell the other way.
    close_calls: usize,
    /// Largest difference of a gate, and of a layer's output.
    worst_gate: f32,
    worst_output: f32,
}

#[test]
fn reference_outputs() {
    let gpu = gpu();
    let mut report = Report::default();
    let mut uncovered: Vec<String> = vec![];
    let mut covered = 0;
    for file in files() {
        match KINDS.iter().find(|(kind, _)| *kind == file.case.kind) {
            Some((_, check)) => {
                check(&file, gpu.as_ref(), &mut report);
                covered += 1;
            }
            None => uncovered.push(file.case.kind),
        }
    }
    uncovered.dedup();
    println!(
        "{covered} files agree; {} choices at a boundary fell the other way; gates differ by {:e} at most, layer outputs by {:e}",
        report.close_calls, report.worst_gate, report.worst_output
    );
    if !uncovered.is_empty() {
        println!("kinds not yet covered: {}", uncovered.join(", "));
    }
}

const ATOL: f32 = 1e-5;
const RTOL: f32 = 1e-4;

/// Compares a choice, `[tokens, experts]`. `value(t, e)` is what was chosen by; where a pair differs, the same list (a
/// token's or an expert's, by `list`) must hold a pair that differs the other way within `ulps` of it.
fn compare_choice(
    what: &str,
    (got, want): (&[bool], &[bool]),
    list: impl Fn(usize) -> usize,
    value: &[f32],
    ulps: f32,
    report: &mut Report,
) {
    assert_eq!(got.len(), want.len(), "{what}");
    let differ: Vec<usize> = (0..got.len()).filter(|&i| got[i] != want[i]).collect();
    for &i in &differ {
        let close = |j: &&usize| {
            let (a, b) = (value[i], value[**j]);
            list(**j) == list(i)
                && got[**j] != got[i]
                && (a - b).abs() <= ulps * f32::EPSILON * a.abs().max(b.abs())
        };
        assert!(
            differ.iter().any(|j| close(&j)),
            "{what}: pair {i} (value {}): got {}, want {}",
            value[i],
            got[i],
            want[i]
        );
    }
    report.close_calls += differ.len() / 2;
}

/// Compares gates where both chose alike.
fn compare_gates(
    what: &str,
    got: &[f32],
    want: &[f32],
    alike: impl Fn(usize) -> bool,
    report: &mut Report,
) {
    assert_eq!(got.len(), want.len(), "{what}");
    for i in (0..got.len()).filter(|&i| alike(i)) {
        let error = (got[i] - want[i]).abs();
        assert!(
            error <= ATOL + RTOL * want[i].abs(),
            "{what}: gate {i}: got {}, want {}",
            got[i],
            want[i]
        );
        report.worst_gate = report.worst_gate.max(error);
    }
}

/// The bit set as `[tokens, experts]`.
fn dense(assigned: &[u32], tokens: usize, experts: usize) -> Vec<bool> {
    (0..tokens * experts).map(|i| bits::get(assigned, tokens, i % experts, i / experts)).collect()
}

/// How a case is routed: the same on twins and device.
struct Routing<'a> {
    tokens: usize,
    experts: usize,
    logits: &'a [f32],
    bias: Option<&'a [f32]>,
    score: Score,
    /// Whether the choice is by logits, the weights being normalised after it by a softmax.
    from_logits: bool,
    rule: Rule<'a>,
    gates: GateRule,
    scale: f32,
    scale_by_count: Option<&'a [f32]>,
    /// Most tokens of an expert, dropping the lowest gates.
    drop: Option<u32>,
}

enum Rule<'a> {
    Experts { offsets: &'a [u32], capacity: &'a [u32] },
    Tokens { top: usize, groups: Option<Groups> },
}

/// What routing gives: the choice before any drop, what was chosen by, the choice, the gates `[tokens, experts]`.
struct Routed {
    first: Vec<u32>,
    r: Vec<f32>,
    assigned: Vec<u32>,
    gates: Vec<f32>,
}

impl Routing<'_> {
    fn twin(&self) -> Routed {
        let experts = self.experts;
        let (s, r) = scores::cpu(self.logits, experts, self.score, self.from_logits, self.bias);
        let first = match self.rule {
            Rule::Experts { offsets, capacity } => {
                expert_choice::cpu(&r, experts, offsets, None, capacity)
            }
            Rule::Tokens { top, groups } => {
                token_choice::cpu(&r, experts, top, groups, &|_, _| true)
            }
        };
        let source = if self.gates == GateRule::Softmax { self.logits } else { &s };
        let scales = Scales { scale_by_count: self.scale_by_count, scale_by_expert: None };
        let gates = plan_count::cpu(&first, source, experts, self.gates, self.scale, scales);
        let assigned = match self.drop {
            Some(capacity) => expert_choice::cpu_drop(&gates, experts, &first, capacity).0,
            None => first.clone(),
        };
        Routed { first, r, assigned, gates }
    }

    fn device(&self, gpu: &Gpu, ctx: &Context) -> Routed {
        let (t, e) = (self.tokens as u32, self.experts as u32);
        let logits = gpu.upload(self.logits);
        let bias = self.bias.map(|b| gpu.upload(b));
        let [s, r, gates] = [(); 3].map(|()| Output::f32s(gpu, self.logits.len()));
        let assigned = Output::u32s(gpu, self.experts * bits::columns(self.tokens));
        let args = scores::Args {
            logits: (&logits).into(),
            bias: bias.as_ref().map(Into::into),
            scores: s.slice(),
            values: r.slice(),
        };
        let dims =
            scores::Dims { tokens: t, experts: e, score: self.score, by_logits: self.from_logits };
        run(gpu, &Scores::new(ctx).unwrap().bind(&dims, args).unwrap());
        match self.rule {
            Rule::Experts { offsets, capacity } => {
                let (o, c) = (gpu.upload(offsets), gpu.upload(capacity));
                let args = expert_choice::Args {
                    values: r.slice(),
                    offsets: (&o).into(),
                    lengths: None,
                    capacity: (&c).into(),
                    assigned: assigned.slice(),
                };
                let dims =
                    expert_choice::Dims { tokens: t, experts: e, sequences: capacity.len() as u32 };
                run(gpu, &ExpertChoice::new(ctx).unwrap().bind(&dims, args).unwrap());
            }
            Rule::Tokens { top, groups } => {
                let args = token_choice::Args {
                    values: r.slice(),
                    coresets: None,
                    assigned: assigned.slice(),
                };
                let op = TokenChoice::new(ctx, e, top as u32, groups).unwrap();
                run(gpu, &op.bind(&token_choice::Dims { tokens: t }, args).unwrap());
            }
        }
        let first: Vec<u32> = assigned.get(gpu);
        let shape = PlanShape {
            tokens: t,
            experts: e,
            shared_experts: 0,
            routed_slots: t * e,
            tile_rows: 16,
            skinny_rows: 0,
        };
        let plan = Output::u32s(gpu, shape.bytes().unwrap() as usize / 4);
        let scale_by_count = self.scale_by_count.map(|b| gpu.upload(b));
        let args = plan_count::Args {
            assigned: assigned.slice(),
            gates: Some(plan_count::Gates {
                rule: self.gates,
                source: if self.gates == GateRule::Softmax { (&logits).into() } else { s.slice() },
                scale: self.scale,
                scales: Scales {
                    scale_by_count: scale_by_count.as_ref().map(Into::into),
                    scale_by_expert: None,
                },
                gates: gates.slice(),
            }),
            plan: plan.slice(),
        };
        run(gpu, &PlanCount::new(ctx).unwrap().bind(&shape, args).unwrap());
        if let Some(capacity) = self.drop {
            let dropped = Output::u32s(gpu, self.experts);
            let (o, c) = (gpu.upload(&[0, t]), gpu.upload(&[capacity]));
            let args = expert_choice::DropArgs {
                gates: gates.slice(),
                offsets: (&o).into(),
                capacity: (&c).into(),
                assigned: assigned.slice(),
                dropped: dropped.slice(),
            };
            run(
                gpu,
                &ExpertChoice::new(ctx)
                    .unwrap()
                    .bind_drop(&expert_choice::DropDims { tokens: t, experts: e }, args)
                    .unwrap(),
            );
        }
        Routed { first, r: r.get(gpu), assigned: assigned.get(gpu), gates: gates.get(gpu) }
    }

    /// Routes on the twins and in every variant; each result goes to `compare`, by name.
    fn everywhere(&self, file: &File, gpu: Option<&Gpu>, mut compare: impl FnMut(&str, &Routed)) {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy();
        compare(&format!("{name}, CPU twins"), &self.twin());
        if let Some(gpu) = gpu {
            for ctx in contexts(gpu) {
                compare(&format!("{name}, {}", variant_name(&ctx)), &self.device(gpu, &ctx));
            }
        }
    }

    /// Compares masks and gates given densely. A drop is by gates, the choice before it by `r`.
    fn compare_dense(&self, file: &File, gpu: Option<&Gpu>, report: &mut Report) {
        let (tokens, experts) = (self.tokens, self.experts);
        let want: Vec<bool> =
            file.must("selected", file.u8s("selected")).iter().map(|&s| s != 0).collect();
        let want_gates = file.must("gates", file.f32s("gates"));
        let sequence = |t: usize| match self.rule {
            Rule::Experts { offsets, .. } => offsets.iter().filter(|&&o| o as usize <= t).count(),
            Rule::Tokens { .. } => 0,
        };
        self.everywhere(file, gpu, |what, got| {
            let mask = dense(&got.assigned, tokens, experts);
            let scale_by_expert = |i: usize| (i % experts) * (tokens + 1) + sequence(i / experts);
            match self.rule {
                // An expert's list in a sequence; a drop is a list of an expert over the batch, compared by gates.
                Rule::Experts { .. } => {
                    compare_choice(what, (&mask, &want), scale_by_expert, &got.r, 8.0, report);
                }
                Rule::Tokens { .. } if self.drop.is_some() => {
                    compare_choice(what, (&mask, &want), scale_by_expert, &got.gates, 16.0, report);
                }
                Rule::Tokens { .. } => {
                    compare_choice(what, (&mask, &want), |i| i / experts, &got.r, 8.0, report);
                }
            }
            let gate = |i: usize| if mask[i] { got.gates[i] } else { 0.0 };
            let gates: Vec<f32> = (0..mask.len()).map(gate).collect();
            compare_gates(what, &gates, &want_gates, |i| mask[i] == want[i], report);
            if let Some(counts) = file.i32s("tokens_per_expert_before_drop") {
                let got: Vec<i32> = (0..experts)
                    .map(|e| bits::tokens_of(&got.first, tokens, e).len() as i32)
                    .collect();
                assert_same(&got, &counts, &format!("{what}: tokens_per_expert_before_drop"));
            }
        });
    }
}

fn expert_choice(file: &File, gpu: Option<&Gpu>, report: &mut Report) {
    let case = &file.case;
    let sequences = case.sequences.expect("sequences");
    let length = case.tokens.expect("tokens");
    let experts = case.experts.expect("experts");
    let tokens = sequences * length;
    let k = case.average_experts_per_token.expect("average_experts_per_token");
    let logits = file.must("logits", file.f32s("logits"));
    let (offsets, capacity): (Vec<u32>, Vec<u32>) = match case.scope.as_deref() {
        Some("batch") => (vec![0, tokens as u32], vec![(tokens * k / experts).max(1) as u32]),
        Some("sequence") => {
            let ks = file.i32s("experts_per_token").unwrap_or(vec![k as i32; sequences]);
            let capacity = |&k: &i32| (length * k as usize / experts).clamp(1, length) as u32;
            (
                (0..=sequences).map(|b| (b * length) as u32).collect(),
                ks.iter().map(capacity).collect(),
            )
        }
        other => panic!("scope {other:?}"),
    };
    let scale_by_count = file.f32s("scaling_factors");
    let gates = match (case.after(), case.score()) {
        (false, _) => GateRule::Plain,
        (true, Score::Softmax) => GateRule::Softmax,
        (true, Score::Sigmoid) => GateRule::Normalised,
    };
    let routing = Routing {
        tokens,
        experts,
        logits: &logits,
        bias: None,
        score: case.score(),
        from_logits: case.after(),
        rule: Rule::Experts { offsets: &offsets, capacity: &capacity },
        gates,
        scale: 1.0,
        scale_by_count: scale_by_count.as_deref(),
        drop: None,
    };
    routing.compare_dense(file, gpu, report);
}

fn token_choice(file: &File, gpu: Option<&Gpu>, report: &mut Report) {
    let case = &file.case;
    let (tokens, experts) = (case.tokens.expect("tokens"), case.experts.expect("experts"));
    let top = case.experts_per_token.expect("experts_per_token");
    let logits = file.must("logits", file.f32s("logits"));
    let gates = match (case.after(), case.score()) {
        (false, _) => GateRule::Plain,
        (true, Score::Softmax) => GateRule::Softmax,
        (true, Score::Sigmoid) => GateRule::Normalised,
    };
    let drop = case.capacity_factor.map(|factor| {
        assert_eq!(case.drop.as_deref(), Some("lowest_probability"));
        ((tokens * top) as f64 / experts as f64 * factor).ceil() as u32
    });
    let routing = Routing {
        tokens,
        experts,
        logits: &logits,
        bias: None,
        score: case.score(),
        from_logits: case.after() && case.score() == Score::Softmax,
        rule: Rule::Tokens { top, groups: None },
        gates,
        scale: 1.0,
        scale_by_count: None,
        drop,
    };
    routing.compare_dense(file, gpu, report);
}

fn group_limited(file: &File, gpu: Option<&Gpu>, report: &mut Report) {
    let case = &file.case;
    let tokens = case.sequences.expect("sequences") * case.tokens.expect("tokens");
    let experts = case.experts.expect("experts");
    let top = case.experts_per_token.expect("experts_per_token");
    let logits = file.must("logits", file.f32s("logits"));
    let bias = file.must("expert_bias", file.f32s("expert_bias"));
    let groups = Groups {
        count: case.groups.expect("groups"),
        top: case.groups_per_token.expect("groups_per_token"),
    };
    let routing = Routing {
        tokens,
        experts,
        logits: &logits,
        bias: Some(&bias),
        score: case.score(),
        from_logits: false,
        rule: Rule::Tokens { top, groups: Some(groups) },
        gates: GateRule::Normalised,
        scale: case.routed_scaling_factor.expect("routed_scaling_factor"),
        scale_by_count: None,
        drop: None,
    };
    // The reference's lists `[tokens, top]`, in an order of its own.
    let ids = file.must("experts", file.i32s("experts"));
    let weights = file.must("weights", file.f32s("weights"));
    let (mut want, mut want_gates) = (vec![false; tokens * experts], vec![0.0; tokens * experts]);
    for (i, (&id, &weight)) in ids.iter().zip(&weights).enumerate() {
        let at = i / top * experts + usize::try_from(id).expect("an expert");
        want[at] = true;
        want_gates[at] = weight;
    }
    routing.everywhere(file, gpu, |what, got| {
        let mask = dense(&got.assigned, tokens, experts);
        compare_choice(what, (&mask, &want), |i| i / experts, &got.r, 8.0, report);
        let gates: Vec<f32> =
            (0..mask.len()).map(|i| if mask[i] { got.gates[i] } else { 0.0 }).collect();
        let alike = |i: usize| {
            let row = i / experts * experts..(i / experts + 1) * experts;
            mask[row.clone()] == want[row]
        };
        compare_gates(what, &gates, &want_gates, alike, report);
    });
    let Some(layer) =
        Layer::read(&file.bytes).unwrap_or_else(|e| panic!("{}: {e}", file.path.display()))
    else {
        return; // routing alone was recorded
    };
    let name = file.path.file_name().unwrap_or_default().to_string_lossy();
    let mut compare = |variant: &str, got: Vec<f32>| {
        let (error, ok) = layer.compare(&got);
        assert!(ok, "{name}, {variant}: `y` differs by {error:e}");
        report.worst_output = report.worst_output.max(error);
    };
    compare("CPU twins", layer.on_cpu());
    if let Some(gpu) = gpu {
        for ctx in contexts(gpu) {
            compare(&variant_name(&ctx), layer.on_gpu(gpu, &ctx).expect("the layer's output"));
        }
    }
}

#[test]
fn a_choice_that_differs_is_noticed() {
    let value = [1.0, 0.5, 0.5 + 2.0 * f32::EPSILON, 0.25];
    let (a, b) = ([true, true, false, false], [true, false, true, false]);
    let mut report = Report::default();
    compare_choice("close", (&a, &b), |_| 0, &value, 8.0, &mut report);
    assert_eq!(report.close_calls, 1);
    let far = [true, false, false, true];
    let refused = |want: [bool; 4], list: fn(usize) -> usize| {
        std::panic::catch_unwind(move || {
            compare_choice("far", (&a, &want), list, &value, 8.0, &mut Report::default());
        })
        .is_err()
    };
    assert!(refused(far, |_| 0));
    assert!(refused(b, |i| i));
    assert!(refused([true, false, false, false], |_| 0));
}

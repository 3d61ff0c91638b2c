//! What the reference implementations of block-level rules returned, on the CPU twins and on the GPU in every variant: one
//! function a kind, each taking a parsed file.
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::path::Path;
use testkit::prelude::{Output, assert_close, contexts, gpu, run};
use wgmoe::ops::coreset::{self, Coreset};
use wgmoe::ops::plan_count::{self, PlanCount, Scales};
use wgmoe::ops::scores::{self, Scores};
use wgmoe::ops::sequence_top::{self, SequenceTop};
use wgmoe::ops::token_choice::{self, TokenChoice};
use wgmoe::plan::bits;
use wgmoe::routing::GateRule;
use wgmoe::routing::Groups;
use wgmoe::{BlockRule, Context, Gpu, PlanShape, Score};

const ATOL: f32 = 1e-5;
const RTOL: f32 = 1e-4;

/// The settings of a case, over all kinds.
#[derive(Deserialize)]
struct Case {
    kind: String,
    sequences: Option<usize>,
    tokens: Option<usize>,
    experts: Option<usize>,
    experts_per_token: Option<usize>,
    score: Option<String>,
    groups: Option<u32>,
    groups_per_token: Option<u32>,
    routed_scaling_factor: Option<f32>,
    normalise_weights: Option<bool>,
    block: Option<usize>,
    top_p: Option<f32>,
    min_coreset: Option<u32>,
    capacity: Option<u32>,
    core: Option<u32>,
    keep: Option<u32>,
    base: Option<u32>,
}

/// A file: its name, settings and tensors.
struct File {
    name: String,
    bytes: Vec<u8>,
    case: Case,
}

impl File {
    fn open(path: &Path) -> Self {
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        let bytes = std::fs::read(path).expect(&name);
        let (_, header) = SafeTensors::read_metadata(&bytes).expect(&name);
        let text = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get("case"))
            .expect("`case` in the header")
            .clone();
        let case = serde_json::from_str(&text).expect(&name);
        Self { name, bytes, case }
    }

    fn raw(&self, name: &str, dtype: Dtype) -> Option<Vec<u8>> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("tensors");
        let tensor = tensors.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), dtype, "{}: `{name}`", self.name);
        Some(tensor.data().to_vec())
    }

    fn f32s(&self, name: &str) -> Option<Vec<f32>> {
        Some(bytemuck::pod_collect_to_vec(&self.raw(name, Dtype::F32)?))
    }

    fn i32s(&self, name: &str) -> Option<Vec<i32>> {
        Some(bytemuck::pod_collect_to_vec(&self.raw(name, Dtype::I32)?))
    }

    fn u8s(&self, name: &str) -> Option<Vec<u8>> {
        self.raw(name, Dtype::U8)
    }
}

type Check = fn(&File, Option<&Gpu>);

const KINDS: &[(&str, Check)] = &[
    ("block_coreset", block),
    ("block_capacity", block),
    ("saliency_vote", block),
    ("sequence_union", block),
    ("opportunistic", block),
    ("sequence_top", sequence_top),
];

#[test]
fn block_rules_agree_with_their_references() {
    let gpu = gpu();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut paths: Vec<_> = std::fs::read_dir(&folder)
        .expect("golden files")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    let mut seen = vec![0; KINDS.len()];
    for file in paths.iter().map(|path| File::open(path)) {
        if let Some(i) = KINDS.iter().position(|(kind, _)| *kind == file.case.kind) {
            KINDS[i].1(&file, gpu.as_ref());
            seen[i] += 1;
        }
    }
    assert!(seen.iter().all(|&n| n > 0), "kinds without a file: {seen:?} of {KINDS:?}");
}

/// How a case is routed: the same on twins and device.
struct Routing {
    experts: usize,
    logits: Vec<f32>,
    bias: Option<Vec<f32>>,
    score: Score,
    top: usize,
    groups: Option<Groups>,
    /// Of blocks, or of sequences.
    offsets: Vec<u32>,
    /// The highest pairs of each sequence where absent.
    rule: Option<BlockRule>,
    gates: GateRule,
    scale: f32,
}

struct Routed {
    /// `[blocks, experts]`; empty without blocks.
    coreset: Vec<bool>,
    assigned: Vec<u32>,
    gates: Vec<f32>,
}

impl Routing {
    fn new(file: &File) -> Self {
        let case = &file.case;
        let experts = case.experts.expect("experts");
        let logits = file.f32s("logits").expect("logits");
        let offsets = match (file.i32s("block_offsets"), case.block) {
            (Some(offsets), _) => offsets.into_iter().map(|o| o as u32).collect(),
            (None, Some(block)) => {
                // Blocks of each sequence; the last one may be short.
                let (sequences, tokens) =
                    (case.sequences.expect("sequences"), case.tokens.expect("tokens"));
                let starts = (0..sequences)
                    .flat_map(|b| (0..tokens).step_by(block).map(move |t| b * tokens + t));
                starts.chain([sequences * tokens]).map(|t| t as u32).collect()
            }
            (None, None) => panic!("{}: no blocks", file.name),
        };
        let rule = match case.kind.as_str() {
            "block_coreset" => Some(BlockRule::Mass {
                p: case.top_p.expect("top_p"),
                floor: case.min_coreset.expect("min_coreset"),
            }),
            "block_capacity" => Some(BlockRule::Capacity(case.capacity.expect("capacity"))),
            "saliency_vote" => Some(BlockRule::Vote(case.core.expect("core"))),
            "sequence_union" => Some(BlockRule::Union(case.keep.expect("keep"))),
            "opportunistic" => Some(BlockRule::Union(case.base.expect("base"))),
            _ => None,
        };
        let groups = case
            .groups
            .map(|count| Groups { count, top: case.groups_per_token.expect("groups_per_token") });
        Self {
            experts,
            logits,
            bias: file.f32s("expert_bias"),
            score: if case.score.as_deref() == Some("softmax") {
                Score::Softmax
            } else {
                Score::Sigmoid
            },
            top: case.experts_per_token.expect("experts_per_token"),
            groups,
            offsets,
            rule,
            gates: if case.normalise_weights == Some(false) {
                GateRule::Plain
            } else {
                GateRule::Normalised
            },
            scale: case.routed_scaling_factor.unwrap_or(1.0),
        }
    }

    fn tokens(&self) -> usize {
        self.logits.len() / self.experts
    }

    fn blocks(&self) -> usize {
        self.offsets.len() - 1
    }

    fn dense_coreset(&self, members: &[u32]) -> Vec<bool> {
        let words = self.experts.div_ceil(32);
        (0..self.blocks() * self.experts)
            .map(|i| {
                let (block, e) = (i / self.experts, i % self.experts);
                members[block * words + e / 32] >> (e % 32) & 1 == 1
            })
            .collect()
    }

    fn twin(&self) -> Routed {
        let experts = self.experts;
        let (s, r) = scores::cpu(&self.logits, experts, self.score, false, self.bias.as_deref());
        let (coreset, assigned) = match self.rule {
            None => (vec![], sequence_top::cpu(&r, experts, self.top, &self.offsets)),
            Some(rule) => {
                let own = rule.own_top(self.top as u32).map_or(vec![], |k| {
                    token_choice::cpu(&r, experts, k as usize, None, &|_, _| true)
                });
                let (members, block_of) =
                    coreset::cpu(rule, &r, experts, &own, &self.offsets, None);
                let coreset = self.dense_coreset(&members);
                let eligible = |t: usize, e: usize| coreset[block_of[t] as usize * experts + e];
                let assigned = token_choice::cpu(&r, experts, self.top, self.groups, &eligible);
                (coreset, assigned)
            }
        };
        let gates =
            plan_count::cpu(&assigned, &s, experts, self.gates, self.scale, Scales::default());
        Routed { coreset, assigned, gates }
    }

    fn device(&self, gpu: &Gpu, ctx: &Context) -> Routed {
        let (tokens, experts, blocks) =
            (self.tokens() as u32, self.experts as u32, self.blocks() as u32);
        let logits = gpu.upload(&self.logits);
        let offsets = gpu.upload(&self.offsets);
        let bias = self.bias.as_ref().map(|b| gpu.upload(b));
        let [s, r, gates] = [(); 3].map(|()| Output::f32s(gpu, self.logits.len()));
        let words = self.experts * bits::columns(self.tokens());
        let [own, assigned] = [(); 2].map(|()| Output::u32s(gpu, words));
        let members = Output::u32s(gpu, self.blocks() * self.experts.div_ceil(32));
        let block_of = Output::u32s(gpu, self.tokens());
        let args = scores::Args {
            logits: (&logits).into(),
            bias: bias.as_ref().map(Into::into),
            scores: s.slice(),
            values: r.slice(),
        };
        let dims = scores::Dims { tokens, experts, score: self.score, by_logits: false };
        let mut step = Scores::new(ctx).unwrap().bind(&dims, args).unwrap();
        match self.rule {
            None => {
                let dims =
                    sequence_top::Dims { tokens, experts, sequences: blocks, top: self.top as u32 };
                let args = sequence_top::Args {
                    values: r.slice(),
                    offsets: (&offsets).into(),
                    assigned: assigned.slice(),
                };
                step = step.then(SequenceTop::new(ctx).unwrap().bind(&dims, args).unwrap());
            }
            Some(rule) => {
                let k = rule.own_top(self.top as u32);
                if let Some(k) = k {
                    let args = token_choice::Args {
                        values: r.slice(),
                        coresets: None,
                        assigned: own.slice(),
                    };
                    let op = TokenChoice::new(ctx, experts, k, None).unwrap();
                    step =
                        step.then(op.bind(&token_choice::Dims { tokens: tokens }, args).unwrap());
                }
                let args = coreset::Args {
                    values: r.slice(),
                    own_choice: k.map(|_| own.slice()),
                    offsets: (&offsets).into(),
                    voters: None,
                    members: members.slice(),
                    block_of: block_of.slice(),
                };
                let op = Coreset::new(ctx, experts, rule).unwrap();
                step = step.then(op.bind(&coreset::Dims { tokens, blocks }, args).unwrap());
                let coresets = token_choice::Coresets {
                    blocks,
                    coreset: members.slice(),
                    block_of: block_of.slice(),
                };
                let args = token_choice::Args {
                    values: r.slice(),
                    coresets: Some(coresets),
                    assigned: assigned.slice(),
                };
                let op = TokenChoice::new(ctx, experts, self.top as u32, self.groups).unwrap();
                step = step.then(op.bind(&token_choice::Dims { tokens: tokens }, args).unwrap());
            }
        }
        let shape = PlanShape {
            tokens,
            experts,
            shared_experts: 0,
            routed_slots: tokens * self.top as u32,
            tile_rows: 16,
            skinny_rows: 0,
        };
        let plan = Output::u32s(gpu, shape.bytes().unwrap() as usize / 4);
        let args = plan_count::Args {
            assigned: assigned.slice(),
            gates: Some(plan_count::Gates {
                rule: self.gates,
                source: s.slice(),
                scale: self.scale,
                scales: Scales { scale_by_count: None, scale_by_expert: None },
                gates: gates.slice(),
            }),
            plan: plan.slice(),
        };
        step = step.then(PlanCount::new(ctx).unwrap().bind(&shape, args).unwrap());
        run(gpu, &step);
        let coreset =
            if self.rule.is_some() { self.dense_coreset(&members.get::<u32>(gpu)) } else { vec![] };
        Routed { coreset, assigned: assigned.get(gpu), gates: gates.get(gpu) }
    }

    /// Routes on the twins and in every variant; each result goes to `compare`, by name.
    fn everywhere(&self, file: &File, gpu: Option<&Gpu>, compare: impl Fn(&str, &Routed)) {
        compare(&format!("{}, CPU twins", file.name), &self.twin());
        if let Some(gpu) = gpu {
            for ctx in contexts(gpu) {
                compare(&format!("{}, {:?}", file.name, ctx.variant()), &self.device(gpu, &ctx));
            }
        }
    }
}

/// Rules that elect a coreset.
fn block(file: &File, gpu: Option<&Gpu>) {
    let routing = Routing::new(file);
    let (tokens, experts) = (routing.tokens(), routing.experts);
    let want_coreset: Vec<bool> =
        file.u8s("coreset").expect("coreset").iter().map(|&c| c == 1).collect();
    let unique = file.i32s("unique_experts_per_block").expect("unique_experts_per_block");
    let ids = file.i32s("experts").expect("experts");
    let weights = file.f32s("weights").expect("weights");
    let defined = file.u8s("token_is_defined").unwrap_or(vec![1; tokens]);
    routing.everywhere(file, gpu, |what, got| {
        assert_eq!(got.coreset.len(), want_coreset.len(), "{what}");
        for (i, (got, want)) in got.coreset.iter().zip(&want_coreset).enumerate() {
            assert_eq!(got, want, "{what}: block {}, expert {}", i / experts, i % experts);
        }
        let places = |t: usize| t * routing.top..(t + 1) * routing.top;
        for t in (0..tokens).filter(|&t| defined[t] == 1) {
            // The reference's places are in an order of its own; -1 is an empty one.
            let mut want: Vec<(usize, f32)> =
                places(t).filter(|&i| ids[i] >= 0).map(|i| (ids[i] as usize, weights[i])).collect();
            want.sort_by_key(|&(e, _)| e);
            let mine = bits::experts_of(&got.assigned, tokens, t);
            assert_eq!(mine, want.iter().map(|w| w.0).collect::<Vec<_>>(), "{what}: token {t}");
            let gates: Vec<f32> = mine.iter().map(|&e| got.gates[t * experts + e]).collect();
            let weights: Vec<f32> = want.iter().map(|w| w.1).collect();
            assert_close(&gates, &weights, ATOL, RTOL, &format!("{what}: token {t}"));
        }
        for (b, range) in routing.offsets.windows(2).enumerate() {
            let range = range[0] as usize..range[1] as usize;
            if range.clone().all(|t| defined[t] == 1) {
                let used =
                    |&e: &usize| range.clone().any(|t| bits::get(&got.assigned, tokens, e, t));
                assert_eq!(
                    (0..experts).filter(used).count() as i32,
                    unique[b],
                    "{what}: block {b}"
                );
            }
        }
    });
}

fn sequence_top(file: &File, gpu: Option<&Gpu>) {
    let routing = Routing::new(file);
    let (tokens, experts) = (routing.tokens(), routing.experts);
    let selected = file.u8s("selected").expect("selected");
    let want = file.f32s("gates").expect("gates");
    routing.everywhere(file, gpu, |what, got| {
        let mut gates = vec![0.0; want.len()];
        for (i, gate) in gates.iter_mut().enumerate() {
            let (t, e) = (i / experts, i % experts);
            let mine = bits::get(&got.assigned, tokens, e, t);
            assert_eq!(mine, selected[i] == 1, "{what}: token {t}, expert {e}");
            if mine {
                *gate = got.gates[i];
            }
        }
        assert_close(&gates, &want, ATOL, RTOL, what);
    });
}

//! How a recorded case is routed: one description, run on the twins and on the device.
use testkit::golden::File;
use testkit::prelude::{Output, contexts, run, variant_name};
use wgmoe::ops::coreset::{self, Coreset};
use wgmoe::ops::expert_choice::{self, ExpertChoice};
use wgmoe::ops::plan_count::{self, PlanCount, Scales};
use wgmoe::ops::scores::{self, Scores};
use wgmoe::ops::sequence_top::{self, SequenceTop};
use wgmoe::ops::token_choice::{self, TokenChoice};
use wgmoe::plan::bits;
use wgmoe::routing::{BlockRule, GateRule, Groups};
use wgmoe::{BoundOp, Context, Gpu, PlanShape, Score, wgpu};

pub(super) struct Routing {
    pub(super) tokens: usize,
    pub(super) experts: usize,
    /// `[tokens, experts]`.
    pub(super) logits: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) score: Score,
    /// Whether the choice is by logits, the weights being normalised after it by a softmax.
    pub(super) from_logits: bool,
    pub(super) rule: Rule,
    pub(super) gates: GateRule,
    pub(super) scale: f32,
    pub(super) scale_by_count: Option<Vec<f32>>,
    /// Most tokens of an expert, dropping the lowest gates.
    pub(super) drop: Option<u32>,
}

pub(super) enum Rule {
    /// Each expert takes as many tokens of each sequence.
    Experts { offsets: Vec<u32>, capacity: Vec<u32> },
    /// Each token takes as many experts, perhaps of those that its block elects.
    Tokens { top: usize, groups: Option<Groups>, coreset: Option<(BlockRule, Vec<u32>)> },
    /// Each sequence takes its highest pairs.
    Pairs { top: usize, offsets: Vec<u32> },
}

/// What routing gives.
pub(super) struct Routed {
    /// What was chosen by, `[tokens, experts]`.
    pub(super) r: Vec<f32>,
    /// `[blocks, experts]`; empty without blocks.
    pub(super) coreset: Vec<bool>,
    /// The choice before any drop.
    pub(super) first: Vec<u32>,
    pub(super) assigned: Vec<u32>,
    /// `[tokens, experts]`.
    pub(super) gates: Vec<f32>,
}

/// Either the twins or a variant of the device; its name comes first in messages.
pub(super) type Compare<'a> = dyn FnMut(&str, &Routed) -> Result<(), String> + 'a;

impl Routing {
    /// Routes on the twins and in every variant of the GPU.
    pub(super) fn everywhere(
        &self,
        file: &File,
        gpu: Option<&Gpu>,
        compare: &mut Compare<'_>,
    ) -> Result<(), String> {
        if self.logits.len() != self.tokens * self.experts {
            return Err(format!("`logits`: {} values", self.logits.len()));
        }
        compare(&format!("{}, CPU twins", file.name), &self.twin())?;
        let Some(gpu) = gpu else { return Ok(()) };
        for ctx in contexts(gpu) {
            let what = format!("{}, {}", file.name, variant_name(&ctx));
            compare(&what, &self.device(gpu, &ctx))?;
        }
        Ok(())
    }

    /// A coreset's words as `[blocks, experts]`.
    fn members(&self, words: &[u32]) -> Vec<bool> {
        let width = self.experts.div_ceil(32);
        let row = |words: &[u32]| -> Vec<bool> {
            (0..self.experts).map(|e| words[e / 32] >> (e % 32) & 1 == 1).collect()
        };
        words.chunks_exact(width).flat_map(row).collect()
    }

    fn twin(&self) -> Routed {
        let experts = self.experts;
        let bias = self.bias.as_deref();
        let (s, r) = scores::cpu(&self.logits, experts, self.score, self.from_logits, bias);
        let mut members = vec![];
        let first = match &self.rule {
            Rule::Experts { offsets, capacity } => {
                expert_choice::cpu(&r, experts, offsets, None, capacity)
            }
            Rule::Pairs { top, offsets } => sequence_top::cpu(&r, experts, *top, offsets),
            Rule::Tokens { top, groups, coreset: None } => {
                token_choice::cpu(&r, experts, *top, *groups, &|_, _| true)
            }
            Rule::Tokens { top, groups, coreset: Some((rule, offsets)) } => {
                let own = rule.own_top(*top as u32).map_or(vec![], |k| {
                    token_choice::cpu(&r, experts, k as usize, None, &|_, _| true)
                });
                let (words, block_of) = coreset::cpu(*rule, &r, experts, &own, offsets, None);
                members = self.members(&words);
                let eligible = |t: usize, e: usize| members[block_of[t] as usize * experts + e];
                token_choice::cpu(&r, experts, *top, *groups, &eligible)
            }
        };
        let source = if self.gates == GateRule::Softmax { &self.logits } else { &s };
        let scales =
            Scales { scale_by_count: self.scale_by_count.as_deref(), scale_by_expert: None };
        let gates = plan_count::cpu(&first, source, experts, self.gates, self.scale, scales);
        let assigned = match self.drop {
            Some(capacity) => expert_choice::cpu_drop(&gates, experts, &first, capacity).0,
            None => first.clone(),
        };
        Routed { r, coreset: members, first, assigned, gates }
    }

    fn device(&self, gpu: &Gpu, ctx: &Context) -> Routed {
        let (t, e) = (self.tokens as u32, self.experts as u32);
        let logits = gpu.upload(&self.logits);
        let bias = self.bias.as_ref().map(|b| gpu.upload(b));
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
        let scores = Scores::new(ctx).unwrap();
        run(gpu, &scores.bind(&dims, args).unwrap());
        let coreset = self.choose(gpu, ctx, &r, &assigned);
        let first: Vec<u32> = assigned.get(gpu);
        let source = if self.gates == GateRule::Softmax { (&logits).into() } else { s.slice() };
        self.weigh(gpu, ctx, source, &assigned, &gates);
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
        let (assigned, gates) = (assigned.get(gpu), gates.get(gpu));
        Routed { r: r.get(gpu), coreset, first, assigned, gates }
    }

    /// The choice; returns the coreset, where there is one.
    fn choose(&self, gpu: &Gpu, ctx: &Context, r: &Output, assigned: &Output) -> Vec<bool> {
        let (tokens, experts) = (self.tokens as u32, self.experts as u32);
        match &self.rule {
            Rule::Experts { offsets, capacity } => {
                let (o, c) = (gpu.upload(offsets), gpu.upload(capacity));
                let args = expert_choice::Args {
                    values: r.slice(),
                    offsets: (&o).into(),
                    lengths: None,
                    capacity: (&c).into(),
                    assigned: assigned.slice(),
                };
                let sequences = capacity.len() as u32;
                let dims = expert_choice::Dims { tokens, experts, sequences };
                run(gpu, &ExpertChoice::new(ctx).unwrap().bind(&dims, args).unwrap());
                vec![]
            }
            Rule::Pairs { top, offsets } => {
                let sequences = offsets.len() as u32 - 1;
                let top = *top as u32;
                let offsets = gpu.upload(offsets);
                let dims =
                    sequence_top::Dims { tokens, experts, sequences, experts_per_token: top };
                let (offsets, assigned) = ((&offsets).into(), assigned.slice());
                let args = sequence_top::Args { values: r.slice(), offsets, assigned };
                run(gpu, &SequenceTop::new(ctx).unwrap().bind(&dims, args).unwrap());
                vec![]
            }
            Rule::Tokens { top, groups, coreset } => {
                let elected = coreset
                    .as_ref()
                    .map(|(rule, offsets)| self.elect(gpu, ctx, r, *rule, *top as u32, offsets));
                let coresets = elected.as_ref().map(|elected| token_choice::Coresets {
                    blocks: elected.blocks,
                    coreset: elected.members.slice(),
                    block_of: elected.block_of.slice(),
                });
                let args = token_choice::Args {
                    experts_per_token: None,
                    values: r.slice(),
                    coresets,
                    assigned: assigned.slice(),
                };
                let op = TokenChoice::new(ctx, experts, *top as u32, *groups).unwrap();
                run(gpu, &op.bind(&token_choice::Dims { tokens }, args).unwrap());
                elected.map_or(vec![], |elected| self.members(&elected.members.get::<u32>(gpu)))
            }
        }
    }

    /// The coresets of the blocks.
    fn elect(
        &self,
        gpu: &Gpu,
        ctx: &Context,
        r: &Output,
        rule: BlockRule,
        top: u32,
        offsets: &[u32],
    ) -> Elected {
        let (tokens, experts) = (self.tokens as u32, self.experts as u32);
        let blocks = offsets.len() as u32 - 1;
        let own = Output::u32s(gpu, self.experts * bits::columns(self.tokens));
        let members = Output::u32s(gpu, blocks as usize * self.experts.div_ceil(32));
        let block_of = Output::u32s(gpu, self.tokens);
        let mut step = BoundOp::default();
        let own_top = rule.own_top(top);
        if let Some(k) = own_top {
            let args = token_choice::Args {
                experts_per_token: None,
                values: r.slice(),
                coresets: None,
                assigned: own.slice(),
            };
            let op = TokenChoice::new(ctx, experts, k, None).unwrap();
            step = step.then(op.bind(&token_choice::Dims { tokens }, args).unwrap());
        }
        let offsets: wgpu::Buffer = gpu.upload(offsets);
        let args = coreset::Args {
            refresh: None,
            values: r.slice(),
            own_choice: own_top.map(|_| own.slice()),
            offsets: (&offsets).into(),
            voters: None,
            members: members.slice(),
            block_of: block_of.slice(),
        };
        let op = Coreset::new(ctx, experts, rule).unwrap();
        run(gpu, &step.then(op.bind(&coreset::Dims { tokens, blocks }, args).unwrap()));
        Elected { blocks, members, block_of }
    }

    /// The gates of the choice.
    fn weigh(
        &self,
        gpu: &Gpu,
        ctx: &Context,
        source: wgmoe::Slice<'_>,
        assigned: &Output,
        gates: &Output,
    ) {
        let shape = PlanShape::on_host(
            self.tokens as u32,
            self.experts as u32,
            (self.tokens * self.experts) as u32,
        )
        .with_item_rows(16, 0);
        let plan = Output::u32s(gpu, shape.bytes().unwrap() as usize / 4);
        let scale_by_count = self.scale_by_count.as_ref().map(|b| gpu.upload(b));
        let args = plan_count::Args {
            assigned: assigned.slice(),
            gates: Some(plan_count::Gates {
                rule: self.gates,
                source,
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
    }
}

struct Elected {
    blocks: u32,
    members: Output,
    block_of: Output,
}

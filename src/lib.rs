//! Mixture-of-experts kernels for diffusion language models, in WGSL on wgpu.
//!
//! The crate routes tokens to experts (experts choose tokens, tokens choose experts, or blocks of
//! tokens elect a few experts first), plans the work on the device, and runs the experts'
//! feed-forward networks. It is a library of kernels, not an engine: the caller owns the device,
//! the queue and the buffers; the crate makes pipelines and bind groups, and records into the
//! caller's encoder or pass. Layers and ops never submit, wait or read back; [`CachedLayer`], the
//! loading of checkpoints, [`tune`](measure::tune::tune) and the helpers of [`Gpu`] do.
//!
//! # Where to start
//!
//! | to | see |
//! |---|---|
//! | run a layer | the example of [`layer`], and `examples/quickstart.rs` |
//! | put it into an engine | the guide to [embedding], `examples/embed` |
//! | pick a routing rule | [`routing`], [`models`] |
//! | load a model | the module `checkpoint` (Cargo feature of that name) |
//! | use one kernel | [`ops`], `examples/single_op.rs` |
//! | compute without a GPU, or test kernels of your own | [`mod@reference`] |
//! | find out what is slow | [`measure`], and the program `wgmoe-bench` |
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | diffusion language model | writes a block of tokens at once, and refines it over several denoising steps |
//! | expert | one of many feed-forward networks of a layer; each token uses a few |
//! | router | the matrix that gives each token a logit for each expert |
//! | scores, selection values | scores are a softmax or sigmoid of the logits, and become gates; experts are chosen by selection values, which may have a bias |
//! | gate | the weight of an expert's output for a token (`topk_weights`) |
//! | slot | one token at one expert |
//! | block | tokens that are decoded together, usually 32 |
//! | coreset | the experts that a block elects, among which its tokens then choose |
//! | vote | what a token's selection value counts for an expert in that election |
//! | mask ratio | the share of a sequence that is still to be written |
//! | plan | which slots there are, in the order of the experts (permute), and back (unpermute) |
//! | gather, combine | copying rows into the plan's order, and summing them back for each token |
//! | page | a buffer of weights that fits one binding of the device |
//!
//! # Shapes
//!
//! Tensors are row-major, f32 unless they say otherwise. `[T, E]` is T rows of E values.
//!
//! | letter | what |
//! |---|---|
//! | T | tokens of a batch |
//! | E | routed experts |
//! | K | experts that a token takes |
//! | C | capacity: tokens that an expert takes |
//! | D | hidden size |
//! | F | intermediate size of one expert |
//! | S | slots: (token, expert) pairs, those of shared experts included |
//!
//! # A layer
//!
//! ```text
//!  x [T, D]
//!     │  logits                             router weights [E, D]
//!     ▼
//!  logits [T, E] ── scores ──> scores (gates are made of them), values (chosen by)
//!     │
//!     │  coreset, where a rule has one: the experts that a block may use
//!     ▼
//!  expert_choice │ token_choice │ sequence_top │ assign (another router's choice)
//!     ▼
//!  assigned: one bit for each pair, [E, ceil(T / 32)] u32 ──> expert_union
//!     │  plan_count, plan_scan, plan_fill
//!     ▼
//!  plan: slots of each expert and token, gates, items of work
//!     │  grouped_matmul, gate and up: takes the rows of x that the plan names; SwiGLU
//!     ▼
//!  h [S, F]
//!     │  grouped_matmul, down
//!     ▼
//!  y [S, D]
//!     │  combine: the slots of each token, times their gates, in expert order
//!     ▼
//!  out [T, D], written or added to
//! ```
//!
//! [`MoeLayer`] is all of this for one layer; [`MoeRouting`] ends with the plan, [`MoeExperts`]
//! starts from another router's choice. Each step is also an op of its own in [`ops`], for
//! engines that need only some: the kernel, its CPU twin, and its arguments are described there.
//! [`ops::gather`] makes the rows of the slots for engines that run the experts themselves, and
//! [`ops::capacity`] makes the capacities of expert choice from the mask ratios of a denoising
//! step ([`schedule`](routing::schedule)). The [bit set](plan::bits) is where the halves meet:
//! every rule ends in one, every plan starts from one.
//!
//! How many slots there are is known to the device alone. The host sizes buffers and grids by
//! upper bounds ([`PlanShape`]).
//!
//! # On the CPU
//!
//! Every kernel has a CPU twin: plain loops with sums in f64, sharing no code with the GPU path.
//! The twins say what the kernels compute, order, ties and NaN included, and need no GPU.
//!
//! ```
//! use wgmoe::ops::plan_count::{self, Scales};
//! use wgmoe::routing::GateRule;
//! use wgmoe::ops::{combine, expert_choice};
//! use wgmoe::PlanShape;
//! use wgmoe::plan::{HostPlan, bits};
//!
//! // Logits of 4 tokens for 2 experts. Each expert takes the 2 tokens that score highest for it.
//! let logits = [2.0, 0.5, 1.0, 3.0, 0.0, 1.0, -1.0, -2.0];
//! let assigned = expert_choice::cpu(&logits, 2, &[0, 4], None, &[2]);
//! assert_eq!(bits::tokens_of(&assigned, 4, 0), [0, 1]);
//! assert_eq!(bits::tokens_of(&assigned, 4, 1), [1, 2]);
//!
//! // Gates: softmax over the experts that took the token.
//! let none = Scales { scale_by_count: None, scale_by_expert: None };
//! let gates = plan_count::cpu(&assigned, &logits, 2, GateRule::Softmax, 1.0, none);
//! assert_eq!(gates[0..2], [1.0, 0.0]);
//! assert!((gates[2] + gates[3] - 1.0).abs() < 1e-6 && gates[3] > gates[2]);
//!
//! // The plan: the tokens of each expert, one after the other.
//! let shape = PlanShape::on_host(4, 2, 4);
//! let plan = HostPlan::cpu(&shape, &assigned, &gates);
//! assert_eq!(plan.expert_offsets, [0, 2, 4]);
//! assert_eq!(plan.token_of, [0, 1, 1, 2]);
//!
//! // What the experts made of the four slots, rows of one value, weighed and summed for each token.
//! // No expert took token 3.
//! let out = combine::cpu(&plan, &[10.0, 20.0, 30.0, 40.0], 1, None);
//! assert_eq!((out[0], out[2], out[3]), (10.0, 40.0, 0.0));
//! assert!((out[1] - (gates[2] * 20.0 + gates[3] * 30.0)).abs() < 1e-5);
//! ```
//!
//! # In an engine
//!
//! Make one [`Context`] a device (it keeps the pipelines), a [`MoeLayer`] for each layer, and a
//! [`BoundLayer`](layer::BoundLayer) for each set of buffers. Binding checks every argument and
//! makes what is needed; recording makes nothing, and can be repeated as often as the work is to
//! run. What changes from step to step (capacities, lengths, blocks, voters) is read from buffers
//! when the work runs.
//!
//! ```no_run
//! use wgmoe::layer::{Batch, BoundLayer, MoeLayer, Router, Scratch, Tensor};
//! use wgmoe::weights::{HostWeights, Projection};
//! use wgmoe::{Context, ExpertWeights, Result, Slice, WeightType, models, wgpu};
//!
//! /// A layer of LLaDA2.0-mini; `matrix` gives an expert's weights, `[out, in]`, as a checkpoint has them.
//! fn load(
//!     device: &wgpu::Device,
//!     queue: &wgpu::Queue,
//!     router: &[f32],
//!     bias: &[f32],
//!     matrix: impl Fn(u32, Projection) -> Vec<half::bf16>,
//! ) -> Result<MoeLayer> {
//!     let ctx = Context::new(device)?;
//!     let config = models::find("llada2-mini").expect("a model of this name").config;
//!     let shape = config.expert_shape(WeightType::Bf16);
//!     let weights = ExpertWeights::new(&ctx, shape)?;
//!     for expert in 0..shape.experts {
//!         for projection in [Projection::Gate, Projection::Up, Projection::Down] {
//!             let values = matrix(expert, projection);
//!             weights.write(queue, expert, projection, HostWeights::Bf16(&values))?;
//!         }
//!     }
//!     let router = Router::new(Tensor::new(&ctx, "router", router)?)
//!         .with_bias(Tensor::new(&ctx, "bias", bias)?);
//!     MoeLayer::new(&ctx, config, router, weights)
//! }
//!
//! /// Once for these buffers. Layers that run one after the other can share scratch.
//! fn bind(
//!     layer: &MoeLayer,
//!     hidden: Slice<'_>,
//!     out: Slice<'_>,
//!     tokens: u32,
//!     scratch: &Scratch,
//! ) -> Result<BoundLayer> {
//!     layer.bind(&Batch::new(hidden, tokens).added_to(out).with_scratch(scratch))
//! }
//!
//! /// Every step, in the engine's own order.
//! fn run(bound: &BoundLayer, encoder: &mut wgpu::CommandEncoder) {
//!     bound.encode(encoder);
//! }
//! ```
//!
//! The guide to [embedding] says what the device needs, who owns what, and what fails
//! how. A [`Slice`] is a range of a buffer, so tensors that an engine keeps in larger buffers are
//! bound where they lie. The same weights run under another rule with [`MoeLayer::with_routing`].
//! [`profile`](measure::profile) says where a step's time goes. [`Gpu`] opens a device of its
//! own, for tests and tools.
//!
//! # Experts that do not fit
//!
//! [`CachedLayer`] runs a layer under a budget of device memory: experts stay in host memory or a
//! mapped checkpoint ([`ExpertSource`]), those that a step's tokens use are brought in, and the
//! least recently used leave. It pays where blocks elect few experts and consecutive denoising
//! steps agree. Such a layer reads back which experts a step uses, and submits in parts:
//! [`cached`](layer::cached) says when it does either.
//!
//! # Variants
//!
//! One kernel has several layouts of the same work; a [`Variant`] says which a context uses.
//! [`Target::Wide`] lets many lanes work on a row and meet in workgroup memory;
//! [`Target::Serial`] is for software drivers, where a barrier costs more than a row: one lane a
//! row, and registers for memory. `subgroups` uses subgroup operations where the device has them.
//! [`Variant::best`] goes by the type of the adapter and its features, and is what
//! [`Context::new`] takes. `matrix` puts experts of many rows on matrix units, at the precision of
//! f32, where the engine hands them over ([`MatrixUnits`]). `tile` is the shape of the tiles that
//! [`Target::Wide`] multiplies many rows in ([`TileShape`]). `small_items` gives 9 to 32 rows of an
//! expert a kernel of their own. [`Variant::PORTABLE`] needs no optional feature and stays within
//! WebGPU's default limits. Weights of 16 bits need no `SHADER_F16`: they are read as integers and
//! widened exactly. All sums are f32.
//!
//! # What is the same every time
//!
//! - Choices are exact: for given selection values every variant and every device chooses the
//!   same pairs, those of the CPU twin. Higher values come first, equal ones by lower index, `+0
//!   == -0`, NaN after `-inf` ([`order`](routing::order)). Votes of blocks are summed as
//!   integers.
//! - Outputs have the same bits at every run on one device and variant, whatever the size of the
//!   weights' pages, however tensors are split to fit bindings, and with all or some of the
//!   experts on the device: no float atomics, and each sum has a fixed order.
//! - Logits, scores and outputs of two variants or devices differ within rounding. Where two
//!   selection values lie that close, so may the choices made from them.
//!
//! # Limits
//!
//! - Experts: at most 1,024 routed ones, and as many shared ([`routing::MAX_EXPERTS`]). Experts a
//!   token takes: at most 64 ([`routing::MAX_TOP`]). Groups of experts: at most 32
//!   ([`routing::MAX_GROUPS`]). Tokens of a block that have a say in its coreset: the first 1,024
//!   ([`ops::coreset::MAX_BLOCK`]).
//! - Weights lie in pages, each a buffer that fits one storage binding of the device, or a lower
//!   limit given to [`ExpertWeights::with_page_limit`]; a page holds whole experts, or columns of
//!   one. A page must hold 32 columns. Each page is a dispatch.
//! - Hidden states, outputs, h and y may be larger than a binding: they are bound in stretches of
//!   rows or columns, each a dispatch. Where the hidden states are, the rows of each stretch of
//!   slots are first copied together, into scratch of at most one binding.
//! - What must fit a storage binding of the device, and is [`Error::Limit`] where it does not:
//!   the router's weights `[E, D]`; each `[T, E]` tensor (131,072 tokens of 256 experts in 128
//!   MiB); the plan (12 bytes a slot and a bit a pair); 32 columns of y (1,048,576 slots in 128
//!   MiB). Under rules in which tokens or blocks choose for themselves, a larger batch can be run
//!   in parts.
//! - Slots, and the words of a plan, must fit `u32`.
//! - Grids fold into three dimensions: no count is limited by 65,535 workgroups. Software drivers
//!   also limit the iterations of a loop; what would pass that limit is an [`Error`] of `bind`.
//!
//! # Errors
//!
//! What a caller can get wrong is an [`Error`] that names the argument, before anything is
//! recorded: sizes, alignment, usages, overlapping slices, rules that make no sense, limits,
//! missing features. A lost device, a destroyed buffer or a buffer of another device are errors
//! too. Zero tokens are no work, not an error. Values inside device buffers are never errors,
//! since the host cannot see them: ids out of range and repeated pairs are ignored, offsets are
//! clamped, and [`Stats`](plan::Stats) count both.
//!
//! # Cargo features
//!
//! `vulkan`, `metal`, `dx12`, `gles` (all on by default) and `webgpu` are wgpu's backends of the
//! same names. A crate that depends on wgpu itself and has its own choice of them can switch all
//! of ours off.
//!
//! `checkpoint` adds the module of that name: layers from directories with `config.json` and
//! safetensors files, or from GGUF files. Loading submits to the caller's queue and waits, since that
//! is what bounds the memory it takes. `serde` lets a [`Variant`] be saved.
//!

#[cfg(feature = "checkpoint")]
pub mod checkpoint;
pub mod device;
#[doc = include_str!("../docs/embedding.md")]
pub mod embedding {}
mod error;
pub mod headless;
pub mod layer;
pub mod measure;
pub mod models;
pub mod ops;
pub mod plan;
pub mod reference;
pub mod report;
pub mod routing;
pub mod weights;

pub use device::{
    BoundOp, Context, ContextOptions, Dispatch, FloatType, Floats, MatrixUnits, Precision, Slice,
    Target, TileShape, Variant,
};
pub use error::{Error, Result};
pub use headless::Gpu;
pub use layer::cached::{CachedLayer, ExpertSource};
pub use layer::{LayerConfig, MoeExperts, MoeLayer, MoeRouting};
pub use ops::SPECS;
pub use plan::PlanShape;
pub use routing::{Activation, BlockRule, Routing, Score};
pub use weights::{ExpertWeights, WeightType};
pub use wgpu;

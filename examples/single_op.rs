//! Single ops, for engines that run the experts themselves: the two highest experts of each token by
//! the caller's scores, the tokens of each expert as one list, and the rows of those tokens.
//!
//! `scripts/with-vulkan cargo run --release --example single_op`
use wgmoe::ops::expert_lists::{self, ExpertLists};
use wgmoe::ops::gather::{self, Gather};
use wgmoe::ops::token_choice::{self, TokenChoice};
use wgmoe::{Context, Gpu};

const TOKENS: u32 = 6;
const EXPERTS: u32 = 4;
const TOP: u32 = 2;
const HIDDEN: u32 = 8;

fn main() -> wgmoe::Result<()> {
    let gpu = Gpu::new()?;
    let ctx = Context::new(&gpu.device)?;
    let zeros = |n: u32| gpu.upload(&vec![0u32; n as usize]);

    // Scores `[tokens, experts]` of any kind: higher is better.
    let scores: Vec<f32> = (0..TOKENS * EXPERTS).map(|i| (i * 37 % 23) as f32 / 23.0).collect();
    let (values, assigned) = (gpu.upload(&scores), zeros(EXPERTS));
    let args = token_choice::Args {
        experts_per_token: None,
        values: (&values).into(),
        coresets: None,
        assigned: (&assigned).into(), // one bit a pair
    };
    let choice = TokenChoice::new(&ctx, EXPERTS, TOP, None)?;
    let choice = choice.bind(&token_choice::Dims { tokens: TOKENS }, args)?;

    // The bits as lists: `offsets` says where each expert's tokens begin.
    let slots = TOKENS * TOP;
    let (offsets, list, lost) = (zeros(EXPERTS + 1), zeros(slots), zeros(EXPERTS));
    let dims = expert_lists::Dims { tokens: TOKENS, experts: EXPERTS, room: slots };
    let args = expert_lists::Args {
        assigned: (&assigned).into(),
        offsets: (&offsets).into(),
        list: (&list).into(),
        lost: (&lost).into(),
    };
    let lists = ExpertLists::new(&ctx)?.bind(&dims, args)?;

    // The rows of those tokens, expert by expert.
    let x: Vec<f32> = (0..TOKENS * HIDDEN).map(|i| i as f32).collect();
    let (x, out) = (gpu.upload(&x), zeros(slots * HIDDEN));
    let dims = gather::Dims { tokens: TOKENS, slots, hidden: HIDDEN };
    let token_of = (&list).into();
    let args = gather::Args { x: (&x).into(), token_of, out: (&out).into() };
    let rows = Gather::new(&ctx)?.bind(&dims, args)?;

    gpu.run(&choice.then(lists).then(rows))?;
    println!("offsets {:?}", gpu.download::<u32>(&offsets)?);
    println!("tokens  {:?}", gpu.download::<u32>(&list)?);
    println!(
        "rows    {:?}",
        gpu.download::<f32>(&out)?.chunks(8).map(|r| r[0]).collect::<Vec<_>>()
    );
    Ok(())
}

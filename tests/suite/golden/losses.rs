//! Recorded losses and their gradients, and biases moved step by step.
use super::kinds::{Outcome, Report};
use crate::balance_loss::{self, Taken};
use crate::router_loss::{self, Tokens};
use crate::{bias_update, cross_entropy};
use testkit::compare::{close, same};
use testkit::golden::{ATOL, File, RTOL};
use testkit::prelude::{contexts, exact, variant_name};
use wgmoe::Gpu;
use wgmoe::ops::router_loss::Coefficients;
use wgmoe::routing::schedule;

/// The value of a loss and the gradient of the logits, against what was recorded.
fn compare(what: &str, file: &File, value: f32, dlogits: &[f32]) -> Outcome {
    let name = &file.name;
    let near = |tensor: &str, got: &[f32]| {
        close(got, &file.f32s(tensor)?, ATOL, RTOL, &format!("{name}, {what}: `{tensor}`"))
    };
    near("value", &[value])?;
    near("d_logits", dlogits)
}

/// The same on the twins, and in every variant of the GPU.
fn everywhere(
    file: &File,
    gpu: Option<&Gpu>,
    twin: (f32, Vec<f32>),
    on: impl Fn(&Gpu, &wgmoe::Context) -> (f32, Vec<f32>),
) -> Outcome {
    compare("twins", file, twin.0, &twin.1)?;
    let Some(gpu) = gpu else { return Ok(()) };
    for ctx in contexts(gpu) {
        let (value, dlogits) = on(gpu, &ctx);
        compare(&variant_name(&ctx), file, value, &dlogits)?;
    }
    Ok(())
}

fn coefficient(file: &File) -> Result<f32, String> {
    file.real("coefficient").map(|c| c as f32).ok_or_else(|| "no `coefficient`".into())
}

pub(super) fn router_z(file: &File, gpu: Option<&Gpu>, _: &mut Report) -> Outcome {
    let [tokens, experts] = [file.number("tokens")?, file.number("experts")?];
    let dims = wgmoe::ops::router_loss::Dims { tokens, experts, experts_per_token: 1 };
    let coefficients = Coefficients { router_z: coefficient(file)?, balance: 0.0 };
    let logits = file.f32s("logits")?;
    let none = vec![0; experts as usize];
    let (values, dlogits) = wgmoe::reference::router_loss(&dims, coefficients, &logits, &none);
    everywhere(file, gpu, (values[0], dlogits), |gpu, ctx| {
        let how = (&dims, coefficients, Tokens::None);
        let got = router_loss::on_gpu(gpu, ctx, how, &logits, None);
        (got.values[0], got.dlogits)
    })
}

pub(super) fn switch(file: &File, gpu: Option<&Gpu>, _: &mut Report) -> Outcome {
    let [tokens, experts] = [file.number("tokens")?, file.number("experts")?];
    let experts_per_token = file.number("experts_per_token")?;
    let dims = wgmoe::ops::router_loss::Dims { tokens, experts, experts_per_token };
    let coefficients = Coefficients { router_z: 0.0, balance: coefficient(file)? };
    let logits = file.f32s("logits")?;
    let counts = file.u32s("tokens_per_expert_before_drop")?;
    let dropped: u32 = match file.real("capacity_factor") {
        None => 0,
        Some(factor) => {
            let share = f64::from(tokens * experts_per_token) / f64::from(experts);
            let most = (share * factor).ceil() as u32;
            counts.iter().map(|&n| n.saturating_sub(most)).sum()
        }
    };
    same(&[dropped], &file.u32s("dropped")?, "`dropped`")?;
    let (values, dlogits) = wgmoe::reference::router_loss(&dims, coefficients, &logits, &counts);
    everywhere(file, gpu, (values[1], dlogits), |gpu, ctx| {
        let how = (&dims, coefficients, Tokens::Given(&counts));
        let got = router_loss::on_gpu(gpu, ctx, how, &logits, None);
        (got.values[1], got.dlogits)
    })
}

pub(super) fn balance(file: &File, gpu: Option<&Gpu>, _: &mut Report) -> Outcome {
    let (sequences, length) = (file.size("sequences")?, file.size("tokens")?);
    let experts = file.number("experts")?;
    let experts_per_token = file.number("divisor_experts_per_token")?;
    let ks = match file.has("experts_per_token") {
        true => file.u32s("experts_per_token")?,
        false => vec![file.number("average_experts_per_token")?; sequences],
    };
    same(&[ks.iter().sum::<u32>() / sequences as u32], &[experts_per_token], "mean k")?;
    let taken = file.u32s("experts_taken")?;
    // Each expert takes its capacity of each sequence.
    let slots: Vec<u32> = taken.chunks(length).map(|row| row.iter().sum()).collect();
    let own = |&k: &u32| experts * schedule::capacity(length as u32, k, experts);
    same(&slots, &ks.iter().map(own).collect::<Vec<_>>(), "`experts_taken` of a sequence")?;
    let tokens = (sequences * length) as u32;
    let dims = wgmoe::ops::balance_loss::Dims { tokens, experts, experts_per_token };
    let coefficient = coefficient(file)?;
    let logits = file.f32s("logits")?;
    let twin = wgmoe::reference::balance_loss(&dims, coefficient, &logits, &taken);
    let plain = [twin.0 / coefficient];
    close(&plain, &file.f32s("value_without_coefficient")?, ATOL, RTOL, "without coefficient")?;
    everywhere(file, gpu, twin, |gpu, ctx| {
        let how = (&dims, coefficient, Taken::Given(&taken));
        let got = balance_loss::on_gpu(gpu, ctx, how, &logits, None);
        (got.value, got.dlogits)
    })
}

pub(super) fn masked_diffusion(file: &File, gpu: Option<&Gpu>, _: &mut Report) -> Outcome {
    let (sequences, length) = (file.size("sequences")?, file.size("tokens")?);
    let classes = file.size("vocabulary")?;
    let by_ratio = match file.text("weight")? {
        "mask_ratio" => true,
        "none" => false,
        other => return Err(format!("weight `{other}`")),
    };
    let (mask, loss_mask) = (file.flags("mask")?, file.flags("loss_mask")?);
    let (targets, logits) = (file.u32s("targets")?, file.f32s("logits")?);
    // What the model saw: the targets, and at masked tokens one and the same class.
    let noisy = file.u32s("noisy")?;
    let hidden = mask.iter().position(|&m| m).ok_or("nothing is masked")?;
    let seen: Vec<u32> =
        mask.iter().zip(&targets).map(|(&m, &t)| if m { noisy[hidden] } else { t }).collect();
    same(&noisy, &seen, "`noisy`")?;
    let share = |row: &[bool]| row.iter().filter(|&&m| m).count() as f32 / row.len() as f32;
    let shares: Vec<f32> = mask.chunks(length).map(share).collect();
    close(&shares, &file.f32s("mask_ratio")?, ATOL, RTOL, "`mask_ratio`")?;

    let offsets: Vec<u32> = (0..=sequences).map(|b| (b * length) as u32).collect();
    let weights =
        |loss_mask: &[bool]| wgmoe::reference::masked_weights(&mask, loss_mask, &offsets, by_ratio);
    // The loss of each token is told before the loss mask, and undivided.
    let all = vec![true; mask.len()];
    let each: Vec<f32> = weights(&all).iter().map(|w| w * mask.len() as f32).collect();
    let (losses, _) = wgmoe::reference::cross_entropy(&logits, classes, &targets, &each);
    close(&losses, &file.f32s("token_loss")?, ATOL, RTOL, "`token_loss`")?;
    let weights = weights(&loss_mask);
    let (losses, dlogits) = wgmoe::reference::cross_entropy(&logits, classes, &targets, &weights);
    let twin = (losses.iter().sum(), dlogits);
    everywhere(file, gpu, twin, |gpu, ctx| {
        let got = cross_entropy::on_gpu(gpu, ctx, classes, &logits, &targets, &weights);
        (got.value, got.dlogits)
    })
}

pub(super) fn bias_update(file: &File, gpu: Option<&Gpu>, _: &mut Report) -> Outcome {
    let [experts, micro] = [file.size("experts")?, file.size("micro_batches")?];
    let rate = file.real("rate").ok_or("no `rate`")? as f32;
    let counts = file.u32s("tokens_per_expert")?;
    // Every micro-batch has as many slots.
    let slots: Vec<u32> = counts.chunks(experts).map(|row| row.iter().sum()).collect();
    same(&slots, &vec![slots[0]; slots.len()], "slots of a micro-batch")?;
    let sums: Vec<Vec<u32>> = counts
        .chunks(experts * micro)
        .map(|step| (0..experts).map(|e| step.iter().skip(e).step_by(experts).sum()).collect())
        .collect();
    let (first, want) = (file.f32s("bias")?, file.f32s("bias_after")?);
    same(&[sums.len()], &[file.size("steps")?], "steps")?;
    let check = |what: &str, update: &dyn Fn(&mut Vec<f32>, &[u32])| {
        let mut bias = first.clone();
        let mut got = vec![];
        for counts in &sums {
            update(&mut bias, counts);
            got.extend(bias.clone());
        }
        same(&exact(&got), &exact(&want), &format!("{what}: `bias_after`"))
    };
    check("twins", &|bias, counts| wgmoe::reference::bias_update(bias, counts, rate))?;
    let Some(gpu) = gpu else { return Ok(()) };
    for ctx in contexts(gpu) {
        check(&variant_name(&ctx), &|bias, counts| {
            *bias = bias_update::on_gpu(gpu, &ctx, bias, counts, rate);
        })?;
    }
    Ok(())
}

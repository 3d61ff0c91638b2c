//! What the reference implementations returned, on the CPU twins and on the GPU in every variant:
//! every tensor of every file of `tests/golden`, or of the folder that `WGMOE_GOLDEN` names.
mod gradients;
mod kinds;
mod losses;
mod quantized;
mod routing;

use kinds::{KINDS, Report, compare_choice};
use std::collections::BTreeMap;
use testkit::golden::{File, LATER, files};
use testkit::prelude::gpu;
use wgmoe::{Gpu, WeightType};

/// Compares a file. None where its kind belongs to a later issue.
fn check(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Option<Result<(), String>> {
    if LATER.iter().any(|(kind, _)| *kind == file.kind()) {
        return None;
    }
    let Some((_, check)) = KINDS.iter().find(|(kind, _)| *kind == file.kind()) else {
        return Some(Err(format!("kind `{}`: neither compared nor of a later issue", file.kind())));
    };
    Some(check(file, gpu, report).and_then(|()| match file.unread()[..] {
        [] => Ok(()),
        ref names => Err(format!("nothing compares {}", names.join(", "))),
    }))
}

#[test]
fn reference_outputs() {
    let gpu = gpu();
    let mut report = Report::default();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut later: BTreeMap<&str, usize> = BTreeMap::new();
    for file in files().expect("golden files") {
        match check(&file, gpu.as_ref(), &mut report) {
            Some(Ok(())) => *seen.entry(file.kind().into()).or_default() += 1,
            Some(Err(e)) => panic!("{}: {e}", file.name),
            None => {
                let (kind, issue) = LATER.iter().find(|(k, _)| *k == file.kind()).expect("later");
                println!("{}: {kind} belongs to a later issue: {issue}", file.name);
                *later.entry(issue).or_default() += 1;
            }
        }
    }
    println!(
        "{} files agree: {seen:?}; {} choices at a boundary fell the other way; gates differ by {:e} at most, \
         layer outputs by {:e}, gradients of hidden states by {:e}; {} of {} tokens of layers defined; {} subnormal weights flushed; of later issues: {later:?}",
        seen.values().sum::<usize>(),
        report.close_calls,
        report.worst_gate,
        report.worst_output,
        report.worst_gradient,
        report.defined,
        report.tokens,
        report.flushed
    );
    let missing: Vec<&str> =
        KINDS.iter().map(|(kind, _)| *kind).filter(|kind| !seen.contains_key(*kind)).collect();
    assert!(missing.is_empty(), "kinds without a file: {missing:?}");
    assert!(gpu.is_none() || 2 * report.defined > report.tokens);
}

/// Places of a tensor where another value must be noticed, and by how much a float is moved: first,
/// middle and last place, or those that have a say. What a reference returned is moved by little.
fn places(file: &File, name: &str) -> (Vec<usize>, f32) {
    let len = file.len(name);
    let ends = vec![0, len / 2, len - 1];
    // A token whose output is defined.
    let defined = file.flags("token_is_defined").unwrap_or(vec![true]);
    let t = defined.iter().position(|&d| d).expect("a defined token");
    match name {
        // Of losses: by enough to see, at tokens that count.
        "logits" if file.kind() == "loss_masked_diffusion" => {
            let width = file.size("vocabulary").expect("a vocabulary");
            let mask = file.flags("mask").expect("a mask");
            let masked: Vec<usize> = (0..mask.len()).filter(|&t| mask[t]).collect();
            (vec![masked[0] * width, masked[masked.len() - 1] * width + width - 1], 4.0)
        }
        "logits" if file.kind().starts_with("loss_") => (ends, 4.0),
        // So much that a choice falls otherwise: pairs that are chosen are not any more.
        "logits" => (chosen_pairs(file), -40.0),
        "expert_bias" => (ends, 40.0),
        "mask_ratio" => (ends[1..].to_vec(), -0.4),
        // Only counts of experts that some token has.
        "scaling_factors" => (vec![file.size("average_experts_per_token").unwrap()], 0.05),
        "gate_proj" | "up_proj" | "down_proj" if file.has("experts") => {
            (of_expert(file, name, t), 0.05)
        }
        "experts" | "weights" | "y" if file.has("token_is_defined") => {
            let width = len / defined.len();
            (vec![t * width, (t + 1) * width - 1], 0.05)
        }
        "data" | "weight" | "dequantized" => (of_value(file, name), 0.05),
        "experts_per_token" if file.has("sequence_offsets") => (longer_capacities(file), 0.05),
        _ => (ends, 0.05),
    }
}

/// Sequences of which an expert takes more tokens where a token has one expert more.
fn longer_capacities(file: &File) -> Vec<usize> {
    let (offsets, counts) = (file.i32s("sequence_offsets"), file.i32s("experts_per_token"));
    let (offsets, counts) = (offsets.expect("offsets"), counts.expect("numbers of experts"));
    let experts = file.size("experts").expect("experts") as i32;
    let capacity = |i: usize, k: i32| ((offsets[i + 1] - offsets[i]) * k / experts).max(1);
    let longer: Vec<usize> = (0..counts.len())
        .filter(|&i| capacity(i, counts[i]) < capacity(i, counts[i] + 1))
        .collect();
    assert!(!longer.is_empty(), "{}: no sequence is long enough", file.name);
    longer
}

/// Where a value is neither zero nor so large that little does not move it: first, middle, last. Of
/// blocks, whose scales may be zero, the byte in the middle of the block of such a value: codes.
fn of_value(file: &File, name: &str) -> Vec<usize> {
    let values = file.f32s("dequantized").expect("values");
    let there = |i: &usize| (1e-6..1.0).contains(&values[*i].abs());
    let all: Vec<usize> = (0..values.len()).filter(there).collect();
    let some = vec![all[0], all[all.len() / 2], all[all.len() - 1]];
    if name != "data" {
        return some;
    }
    let format: WeightType = file.text("format").expect("a format").parse().expect("known");
    let (values, bytes) = (format.block_values() as usize, format.block_bytes() as usize);
    some.into_iter().map(|i| i / values * bytes + bytes / 2).collect()
}

/// The first chosen pair, one in the middle, the last.
fn chosen_pairs(file: &File) -> Vec<usize> {
    let experts = file.size("experts").expect("experts");
    let pairs: Vec<usize> = match file.flags("selected") {
        Ok(selected) => (0..selected.len()).filter(|&i| selected[i]).collect(),
        Err(_) => {
            let top = file.size("experts_per_token").expect("experts_per_token");
            let ids = file.i32s("experts").expect("ids").into_iter().enumerate();
            ids.filter(|&(_, id)| id >= 0).map(|(i, id)| i / top * experts + id as usize).collect()
        }
    };
    vec![pairs[0], pairs[pairs.len() / 2], pairs[pairs.len() - 1]]
}

/// First, middle and last value of the first expert of a token.
fn of_expert(file: &File, name: &str, t: usize) -> Vec<usize> {
    let top = file.size("experts_per_token").expect("experts_per_token");
    let expert = file.i32s("experts").expect("experts")[t * top] as usize;
    let size = file.len(name) / file.size("experts").expect("experts");
    [0, size / 2, size - 1].map(|i| expert * size + i).to_vec()
}

/// Each tensor of each file in turn has another value at one place, and the comparison, here with
/// the twins, must fail.
#[test]
fn every_tensor_is_compared() {
    let (mut noticed, mut missed) = (0, vec![]);
    for file in files().expect("golden files") {
        match check(&file, None, &mut Report::default()) {
            None => continue, // of a later issue
            Some(outcome) => outcome.unwrap_or_else(|e| panic!("{}: {e}", file.name)),
        }
        for name in file.names() {
            let (places, by) = places(&file, name);
            for at in places {
                let corrupted = file.corrupted(name, at, by);
                // A twin may refuse what makes no sense.
                let check = || check(&corrupted, None, &mut Report::default());
                match std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)) {
                    Ok(Some(Ok(()))) => missed.push(format!("{}: {name}[{at}]", file.name)),
                    _ => noticed += 1,
                }
            }
        }
    }
    println!("{noticed} corrupted values noticed, {} not", missed.len());
    assert!(missed.is_empty(), "not noticed: {missed:#?}");
    assert!(noticed > 0);
}

#[test]
fn a_choice_that_differs_is_noticed() {
    let value = [1.0, 0.5, 0.5 + 2.0 * f32::EPSILON, 0.25];
    let (a, b) = ([true, true, false, false], [true, false, true, false]);
    let mut report = Report::default();
    compare_choice("close", (&a, &b), |_| 0, &value, 8.0, &mut report).expect("close");
    assert_eq!(report.close_calls, 1);
    let far = [true, false, false, true];
    let refused = |want: [bool; 4], list: fn(usize) -> usize| {
        compare_choice("far", (&a, &want), list, &value, 8.0, &mut Report::default()).is_err()
    };
    assert!(refused(far, |_| 0));
    assert!(refused(b, |i| i));
    assert!(refused([true, false, false, false], |_| 0));
}

//! Text to learn: a file's bytes, or sentences of a small seeded language with structure that a model can find.
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng, seq::IndexedRandom};

/// Sentences, a line each: sums, nested brackets, and subjects whose verbs agree with them over a distance.
pub fn synthetic(seed: u64, bytes: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut text = String::new();
    while text.len() < bytes {
        match rng.random_range(0..3) {
            0 => sum(&mut rng, &mut text),
            1 => {
                brackets(&mut rng, 0, &mut text);
            }
            _ => agreement(&mut rng, &mut text),
        }
        text.push('\n');
    }
    text.truncate(bytes);
    text.into_bytes()
}

/// Terms of sums are below this.
const TERMS: u32 = 20;

/// Whether no text has this sum: one pair of terms in ten.
fn is_held_out(a: u32, b: u32) -> bool {
    (7 * a + 3 * b).is_multiple_of(10)
}

fn sum(rng: &mut StdRng, text: &mut String) {
    let [a, b] = loop {
        let [a, b] = [(); 2].map(|()| rng.random_range(0..TERMS));
        if !is_held_out(a, b) {
            break [a, b];
        }
    };
    text.push_str(&format!("{a}+{b}={}", a + b));
}

/// Sums that no text has, each at the front of a sequence of `length` bytes: the sequence, and where the answer lies in it.
pub fn problems(length: usize) -> Vec<(Vec<u8>, std::ops::Range<usize>)> {
    let all = (0..TERMS).flat_map(|a| (0..TERMS).map(move |b| (a, b)));
    let problem = |(a, b): (u32, u32)| {
        let question = format!("\n{a}+{b}=");
        let line = format!("{question}{}\n", a + b);
        let answer = question.len()..line.len() - 1;
        let mut text = line.into_bytes();
        text.extend(synthetic(u64::from(a * TERMS + b), length));
        text.truncate(length);
        (text, answer)
    };
    all.filter(|&(a, b)| is_held_out(a, b)).map(problem).filter(|(_, a)| a.end < length).collect()
}

/// One to three pairs side by side, each with others inside; at most five deep.
fn brackets(rng: &mut StdRng, depth: u32, text: &mut String) {
    for _ in 0..rng.random_range(1..=3) {
        let pair = *["()", "[]", "{}"].choose(rng).unwrap_or(&"()");
        text.push_str(&pair[..1]);
        if depth < 4 && rng.random_bool(0.4) {
            brackets(rng, depth + 1, text);
        }
        text.push_str(&pair[1..]);
    }
}

fn agreement(rng: &mut StdRng, text: &mut String) {
    let pick = |rng: &mut StdRng, words: &[&'static str]| *words.choose(rng).unwrap_or(&"it");
    let nouns = ["dog", "bird", "child", "river", "tree"];
    let (subject, other) = (pick(rng, &nouns), pick(rng, &nouns));
    let [many, others] = [(); 2].map(|()| rng.random_bool(0.5));
    let number = |noun: &str, many: bool| match (noun, many) {
        ("child", true) => "children".to_owned(),
        (noun, true) => format!("{noun}s"),
        (noun, false) => noun.to_owned(),
    };
    let place = pick(rng, &["near", "behind", "under"]);
    let verb = pick(rng, &["sleep", "move", "grow"]);
    let ending = if many { "" } else { "s" };
    let (subject, other) = (number(subject, many), number(other, others));
    text.push_str(&format!("the {subject} {place} the {other} {verb}{ending}"));
}

/// Windows of a text at random places.
pub fn windows(text: &[u8], rng: &mut StdRng, count: usize, length: usize) -> Vec<u8> {
    let window = |_| {
        let start = rng.random_range(0..=text.len() - length);
        text[start..start + length].to_vec()
    };
    (0..count).flat_map(window).collect()
}

/// Entropy of single bytes, in nats: the loss of a model that knows how often each is there and no more.
pub fn entropy(text: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    text.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
    let share = |count: u32| f64::from(count) / text.len() as f64;
    counts.into_iter().filter(|&n| n > 0).map(share).map(|p| -p * p.ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_language_keeps_its_rules() {
        let text = String::from_utf8(synthetic(1, 20_000)).unwrap();
        assert_eq!(text.as_bytes(), synthetic(1, 20_000));
        assert_ne!(text.as_bytes(), synthetic(2, 20_000));
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[..lines.len() - 1] {
            if let Some((left, right)) = line.split_once('=') {
                let terms: Vec<u32> = left.split('+').map(|n| n.parse().unwrap()).collect();
                assert_eq!(terms.iter().sum::<u32>().to_string(), right);
                assert!(!is_held_out(terms[0], terms[1]), "{line}");
            } else if let Some(rest) = line.strip_prefix("the ") {
                let many =
                    rest.starts_with("children") || rest.split(' ').next().unwrap().ends_with('s');
                assert_ne!(line.ends_with('s'), many, "{line}");
            } else {
                let mut open = vec![];
                for c in line.chars() {
                    match c {
                        '(' => open.push(')'),
                        '[' => open.push(']'),
                        '{' => open.push('}'),
                        c => assert_eq!(open.pop(), Some(c), "{line}"),
                    }
                }
                assert!(open.is_empty(), "{line}");
            }
        }
    }

    #[test]
    fn problems_are_sums_that_no_text_has() {
        let all = problems(64);
        assert_eq!(all.len(), 40);
        for (text, answer) in all {
            assert_eq!(text.len(), 64);
            let line = String::from_utf8(text[1..answer.end].to_vec()).unwrap();
            let (left, right) = line.split_once('=').unwrap();
            assert_eq!(right.as_bytes(), &text[answer.clone()]);
            let terms: Vec<u32> = left.split('+').map(|n| n.parse().unwrap()).collect();
            assert_eq!(terms.iter().sum::<u32>().to_string(), right);
            assert_eq!((text[0], text[answer.end]), (b'\n', b'\n'));
        }
    }

    #[test]
    fn entropy_is_that_of_shares() {
        assert_eq!(entropy(b"aaaa"), 0.0);
        assert!((entropy(b"abab") - 2f64.ln()).abs() < 1e-12);
    }
}

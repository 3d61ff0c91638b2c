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

fn sum(rng: &mut StdRng, text: &mut String) {
    let [a, b] = [(); 2].map(|()| rng.random_range(0..50));
    text.push_str(&format!("{a}+{b}={}", a + b));
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
                let terms = left.split('+').map(|n| n.parse::<u32>().unwrap());
                assert_eq!(terms.sum::<u32>().to_string(), right);
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
}

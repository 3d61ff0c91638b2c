//! Tables and curves of the runs that are there.
use super::jobs::{MASSES, RETROFITS, RULES, SCHEDULES, mass_name};
use super::scores::Scores;
use super::tables::{Over, said, table};
use super::{Record, read};
use crate::Outcome;
use crate::evaluate::BINS;
use crate::picture::{Chart, Curve};
use std::collections::BTreeMap;
use std::path::Path;

/// All files of a folder.
struct Runs {
    /// By name, then by seed.
    records: BTreeMap<String, BTreeMap<u64, Record>>,
    scores: Vec<Scores>,
    /// Milliseconds of a step, by name.
    times: BTreeMap<String, f64>,
}

/// Writes `claims.md` and the curves of all that is in the folder.
pub(super) fn write(out: &Path) -> Outcome<()> {
    let runs = Runs::read(out)?;
    let mut text = String::new();
    for (title, part) in [
        ("(a) Who chooses", runs.rules()),
        ("(b) Capacity by the share of masked tokens", runs.schedules()),
        ("(c) Retrofit", runs.retrofits()),
        ("(d) Coresets", runs.coresets()),
        ("(e) Router scores", runs.scores()),
    ] {
        text += &format!("### {title}\n\n{part}\n");
    }
    print!("{text}");
    std::fs::write(out.join("claims.md"), text)?;
    let nats = "validation loss, nats a masked token";
    let charts = [
        ("claims_steps.svg", runs.curves("steps", nats, &|_, step| Some(step))),
        ("claims_time.svg", {
            let at = |name: &str, step| Some(step * runs.times.get(name)? / 1e3);
            runs.curves("seconds of training steps", nats, &at)
        }),
        ("claims_capacity.svg", runs.by_ratio()),
        ("claims_coresets.svg", runs.by_experts()),
    ];
    for (name, chart) in charts.into_iter().filter(|(_, chart)| !chart.curves.is_empty()) {
        std::fs::write(out.join(name), chart.draw()?)?;
    }
    Ok(())
}

impl Runs {
    fn read(out: &Path) -> Outcome<Self> {
        let mut runs = Self { records: BTreeMap::new(), scores: vec![], times: BTreeMap::new() };
        let mut paths = std::fs::read_dir(out)?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()?;
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e == "json")) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            if name == "times" {
                let times: Option<Vec<(String, f64)>> = read(path)?;
                runs.times = times.unwrap_or_default().into_iter().collect();
            } else if name.starts_with("scores-") {
                runs.scores.extend(read::<Scores>(path)?);
            } else if let Some(record) = read::<Record>(path)? {
                runs.records.entry(record.name.clone()).or_default().insert(record.seed, record);
            }
        }
        Ok(runs)
    }

    /// A quantity of a model over its seeds.
    fn over(&self, name: &str, of: impl Fn(&Record) -> f64) -> Option<Over> {
        let seeds = self.records.get(name)?;
        Over::of(&seeds.values().map(of).collect::<Vec<_>>())
    }

    /// The difference from another model, seed by seed.
    fn against(&self, name: &str, other: &str, of: impl Fn(&Record) -> f64) -> Option<Over> {
        let (own, other) = (self.records.get(name)?, self.records.get(other)?);
        let pairs = own.iter().filter_map(|(seed, run)| Some(of(run) - of(other.get(seed)?)));
        Over::of(&pairs.collect::<Vec<_>>())
    }

    fn rules(&self) -> String {
        let row = |(name, title): &(&str, &str)| {
            let differs = self.against(name, "token-choice", |r| r.last.loss);
            let half = |r: &Record| {
                r.points.get(r.points.len() / 2).map_or(f64::NAN, |p| p.validation.loss)
            };
            let last = |of: fn(&crate::training::Point) -> f64| {
                self.over(name, move |r| r.points.last().map_or(f64::NAN, of))
            };
            vec![
                title.to_string(),
                said(self.over(name, half), 3),
                said(self.over(name, |r| r.last.loss), 3),
                differs.map_or("-".into(), Over::signed),
                said(last(|p| p.fullest), 2),
                said(last(|p| 100.0 * p.dropped), 1),
                said(self.over(name, |r| 100.0 * r.sums), 0),
                self.times.get(*name).map_or("-".into(), |ms| format!("{ms:.0}")),
            ]
        };
        let rows: Vec<_> = RULES.iter().map(row).collect();
        let head = [
            "rule",
            "loss after half of the steps",
            "loss at the end",
            "against token choice",
            "fullest expert over the mean",
            "dropped, %",
            "sums right, %",
            "ms a step",
        ];
        let bytes = self.over("token-choice", |r| r.entropy);
        format!("{}\nSingle bytes: {} nats.\n", table(&head, &rows), said(bytes, 3))
    }

    fn schedules(&self) -> String {
        let row = |(name, title): &(&str, &str)| {
            let differs = self.against(name, "expert-choice", |r| r.last.loss);
            let bins = (0..BINS).map(|bin| said(self.over(name, |r| r.last.by_ratio[bin]), 2));
            let mut row = vec![title.to_string(), said(self.over(name, |r| r.last.loss), 3)];
            row.push(differs.map_or("-".into(), Over::signed));
            row.extend(bins);
            row
        };
        let rows: Vec<_> = SCHEDULES.iter().map(row).collect();
        let bins: Vec<String> =
            (1..=BINS).map(|bin| format!("to {:.1} %", 100.0 * bin as f64 / BINS as f64)).collect();
        let mut head = vec!["schedule", "loss", "against static"];
        head.extend(bins.iter().map(String::as_str));
        table(&head, &rows)
    }

    fn retrofits(&self) -> String {
        let row = |name: &str, title: &str| {
            let differs = self.against(name, "token-choice", |r| r.last.loss);
            vec![
                title.to_string(),
                self.over(name, |r| r.options.steps as f64)
                    .map_or("-".into(), |steps| format!("{:.0}", steps.mean)),
                said(self.over(name, |r| r.last.loss), 3),
                differs.map_or("-".into(), Over::signed),
                said(self.over(name, |r| 100.0 * r.sums), 0),
            ]
        };
        let mut rows = vec![row("token-choice", "the token-choice model")];
        rows.extend(RETROFITS.iter().map(|(name, title)| row(name, title)));
        let head = ["model", "steps", "loss", "against the model it began as", "sums right, %"];
        table(&head, &rows)
    }

    fn coresets(&self) -> String {
        let cells = |name: &str| {
            [
                said(self.over(name, |r| r.blocks.unwrap_or_default().elected), 1),
                said(self.over(name, |r| r.blocks.unwrap_or_default().experts), 1),
                said(self.over(name, |r| r.last.loss), 3),
                said(self.over(name, |r| 100.0 * r.sums), 0),
            ]
        };
        let mut rows = vec![];
        for (title, as_it_is, on) in [("none", "token-choice", Some("on-token-choice"))]
            .map(|(title, a, b)| (title.to_string(), a.to_string(), b.map(str::to_string)))
            .into_iter()
            .chain(MASSES.map(|(p, tuned)| {
                let on = tuned.then(|| mass_name(p, true));
                (format!("mass {p:.1}"), mass_name(p, false), on)
            }))
        {
            let mut row = vec![title];
            row.extend(cells(&as_it_is));
            let on = on.map(|name| cells(&name)).unwrap_or(["-"; 4].map(String::from));
            row.extend(on.into_iter().skip(1));
            rows.push(row);
        }
        let head = [
            "coreset",
            "elected",
            "used",
            "loss",
            "sums right, %",
            "used, after more steps",
            "loss, after more steps",
            "sums right, after more steps, %",
        ];
        table(&head, &rows)
    }

    fn scores(&self) -> String {
        let over =
            |of: &dyn Fn(&Scores) -> f64| Over::of(&self.scores.iter().map(of).collect::<Vec<_>>());
        let Some(first) = self.scores.first() else { return "-\n".into() };
        let row = |(i, (name, _, _)): (usize, &(String, f64, f64))| {
            let [trained, drawn] = [over(&move |s| s.experts[i].1), over(&move |s| s.experts[i].2)];
            vec![name.clone(), said(trained, 1), said(drawn, 1)]
        };
        let rows: Vec<_> = first.experts.iter().enumerate().map(row).collect();
        let head = ["experts of a block of 32", "trained router", "synthetic scores"];
        let mut text = table(&head, &rows);
        text.push('\n');
        let line = |name: &str, trained: Option<Over>, drawn: Option<Over>| {
            vec![name.to_string(), said(trained, 2), said(drawn, 2)]
        };
        let rows = [
            line("deviation", over(&|s| s.trained.deviation), over(&|s| s.synthetic.deviation)),
            line(
                "share of the variance in experts' means",
                over(&|s| s.trained.of_experts),
                over(&|s| s.synthetic.of_experts),
            ),
            line(
                "share of the rest that a block has in common",
                over(&|s| s.trained.of_blocks),
                over(&|s| s.synthetic.of_blocks),
            ),
            line("step to step: a token's experts that stay", over(&|s| s.steps.experts), None),
            line("step to step: a block's experts used before", over(&|s| s.steps.of_block), None),
            line("step to step: correlation of a logit", over(&|s| s.steps.logits), None),
        ];
        text += &table(&["logits", "trained router", "synthetic scores"], &rows);
        if let Some(sampled) = first.texts.first() {
            text += &format!("\n```text\n{sampled}\n```\n");
        }
        text
    }

    /// Validation losses of a's rules.
    fn curves(&self, x: &str, y: &str, at: &dyn Fn(&str, f64) -> Option<f64>) -> Chart {
        let curve = |(name, title): &(&str, &str)| {
            let seeds: Vec<&Record> = self.records.get(*name)?.values().collect();
            let points = seeds.first()?.points.iter().enumerate();
            let mut curve = Curve::thin(title.to_string(), vec![]);
            for (i, point) in points {
                let losses = seeds.iter().filter_map(|r| Some(r.points.get(i)?.validation.loss));
                let losses: Vec<f64> = losses.collect();
                let [low, high] = [
                    losses.iter().copied().fold(f64::MAX, f64::min),
                    losses.iter().copied().fold(f64::MIN, f64::max),
                ];
                let mean = Over::of(&losses)?.mean;
                curve.points.push((at(name, point.step as f64)?, mean));
                curve.band.push([low, high]);
            }
            Some(curve)
        };
        let curves = RULES.iter().filter_map(curve).collect();
        Chart { x: x.into(), y: y.into(), curves, from_zero: false }
    }

    /// How schedules differ from the static one, by the share of masked tokens.
    fn by_ratio(&self) -> Chart {
        let curve = |(name, title): &(&str, &str)| {
            let mut curve = Curve::thin(title.to_string(), vec![]);
            for bin in 0..BINS {
                let over = self.against(name, "expert-choice", |r| r.last.by_ratio[bin])?;
                let middle = 100.0 * (bin as f64 + 0.5) / BINS as f64;
                curve.points.push((middle, over.mean));
                curve.band.push([over.mean - over.deviation, over.mean + over.deviation]);
            }
            Some(curve)
        };
        let curves = SCHEDULES[1..].iter().filter_map(curve).collect();
        let y = "nats a masked token, against static";
        Chart { x: "masked tokens, %".into(), y: y.into(), curves, from_zero: false }
    }

    /// What coresets cost in loss.
    fn by_experts(&self) -> Chart {
        let curve = |title: &str, tuned: bool| {
            let point = |&(p, has): &(f32, bool)| {
                let name = mass_name(p, tuned);
                let loss = self.over(&name, |r| r.last.loss).filter(|_| has || !tuned)?;
                let used = self.over(&name, |r| r.blocks.unwrap_or_default().experts)?;
                Some((used.mean, loss))
            };
            let points: Vec<(f64, Over)> = MASSES.iter().filter_map(point).collect();
            let band = points.iter().map(|(_, l)| [l.mean - l.deviation, l.mean + l.deviation]);
            let band = band.collect();
            Curve {
                name: title.into(),
                points: points.iter().map(|(x, l)| (*x, l.mean)).collect(),
                band,
            }
        };
        let curves = [curve("as it is", false), curve("after more steps", true)];
        let curves = curves.into_iter().filter(|c| !c.points.is_empty()).collect();
        let [x, y] = ["experts that a block of 32 uses", "validation loss, nats a masked token"];
        Chart { x: x.into(), y: y.into(), curves, from_zero: false }
    }
}

//! Checks of the WGSL itself, of every kernel in every variant. Runs without a GPU.
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use std::collections::BTreeSet;
use std::path::Path;
use wgmoe::device::{Prelude, Spec};
use wgmoe::{SPECS, wgpu};

/// Every kernel in every variant, those for slices that share a buffer included.
fn all() -> impl Iterator<Item = (&'static Spec, Prelude)> {
    SPECS.iter().flat_map(|&spec| {
        (spec.variants)().into_iter().flat_map(move |prelude| {
            // Many variants, which differ in what lies between loads and stores that others share.
            let shared: &[u32] = if is_matrix(&prelude) { &[0] } else { &[0, u32::MAX] };
            shared.iter().map(move |&shared| (spec, Prelude { shared, ..prelude.clone() }))
        })
    })
}

/// Whether it runs on matrix units: on Vulkan and Metal alone, where squares are of 8.
fn is_matrix(prelude: &Prelude) -> bool {
    prelude.features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
}

fn parse(spec: &Spec, prelude: &Prelude) -> (naga::Module, ModuleInfo) {
    // `unpack2x16float`: core WGSL, which wgpu lets pass wherever the driver keeps f16 denormals.
    let mut capabilities = Capabilities::default() | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    if prelude.features.contains(wgpu::Features::SUBGROUP) {
        capabilities |= Capabilities::SUBGROUP;
    }
    if prelude.features.contains(wgpu::Features::SHADER_INT64) {
        capabilities |= Capabilities::SHADER_INT64;
    }
    if is_matrix(prelude) {
        capabilities |= Capabilities::COOPERATIVE_MATRIX | Capabilities::SHADER_FLOAT16;
    }
    let source = spec.source(prelude);
    let options = naga::front::wgsl::Options { capabilities, ..naga::front::wgsl::Options::new() };
    let module =
        naga::front::wgsl::Frontend::new_with_options(options).parse(&source).unwrap_or_else(|e| {
            panic!("{} {}\n{}", spec.name, prelude.label, e.emit_to_string(&source))
        });
    let info =
        Validator::new(ValidationFlags::all(), capabilities).validate(&module).unwrap_or_else(
            |e| panic!("{} {}\n{}", spec.name, prelude.label, e.emit_to_string(&source)),
        );
    (module, info)
}

#[test]
fn every_variant_is_valid_and_matches_its_spec() {
    for (spec, prelude) in all() {
        let what = format!("{} ({})", spec.name, prelude.label);
        let (module, _) = parse(spec, &prelude);
        assert_eq!(module.entry_points.len(), 1, "{what}");
        assert_eq!(module.entry_points[0].name, spec.name, "{what}");
        let size = module.entry_points[0].workgroup_size;
        assert!(size.iter().product::<u32>() <= 256, "{what}: {size:?} lanes");

        let mut bindings: Vec<_> = module
            .global_variables
            .iter()
            .filter_map(|(_, v)| v.binding.as_ref().map(|b| (b.binding, v)))
            .collect();
        bindings.sort_by_key(|b| b.0);
        assert!(bindings.len() <= 9, "{what}: more than 8 storage buffers");
        assert_eq!(bindings.len(), spec.bindings.len() + 1, "{what}: bindings");
        let params = bindings[0].1;
        assert_eq!((bindings[0].0, params.space), (0, naga::AddressSpace::Uniform), "{what}");
        let naga::TypeInner::Struct { ref members, .. } = module.types[params.ty].inner else {
            panic!("{what}: params must be a struct")
        };
        let wgsl: Vec<_> = members.iter().map(|m| (m.name.as_deref().unwrap(), m.offset)).collect();
        assert_eq!(wgsl, spec.params, "{what}: Params differs between WGSL and Rust");
        for (i, ((at, variable), binding)) in bindings[1..].iter().zip(spec.bindings).enumerate() {
            assert_eq!(*at, i as u32 + 1, "{what}");
            assert_eq!(variable.name.as_deref(), Some(binding.name), "{what}");
            let naga::AddressSpace::Storage { access } = variable.space else {
                panic!("{what}: `{}` is not in storage", binding.name)
            };
            let written = binding.written || (prelude.shared != 0 && !binding.uniform);
            assert_eq!(
                access.contains(naga::StorageAccess::STORE),
                written,
                "{what}: {}",
                binding.name
            );
            let naga::TypeInner::Array { stride, .. } = module.types[variable.ty].inner else {
                panic!("{what}: `{}` is not an array", binding.name)
            };
            assert!(u64::from(stride) >= 4 && binding.item % 4 == 0, "{what}: {}", binding.name);
        }

        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let workgroup: u32 = module
            .global_variables
            .iter()
            .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
            .map(|(_, v)| layouter[v.ty].size.next_multiple_of(16))
            .sum();
        assert!(
            u64::from(workgroup) <= wgmoe::device::WORKGROUP_BYTES,
            "{what}: {workgroup} bytes of workgroup memory"
        );
    }
}

#[test]
fn every_backend_language_is_written() {
    use naga::back;
    for (spec, prelude) in all() {
        let what = format!("{} ({})", spec.name, prelude.label);
        let (module, info) = parse(spec, &prelude);
        let wide = prelude.features.contains(wgpu::Features::SHADER_INT64);

        let options = back::spv::Options { lang_version: (1, 3), ..Default::default() };
        back::spv::write_vec(&module, &info, &options, None)
            .unwrap_or_else(|e| panic!("{what}: SPIR-V: {e}"));

        if is_matrix(&prelude) && prelude.text.contains("coop_mat16x16") {
            continue;
        }
        let options = back::msl::Options {
            lang_version: (2, 3),
            fake_missing_bindings: true,
            ..Default::default()
        };
        back::msl::write_string(&module, &info, &options, &Default::default())
            .unwrap_or_else(|e| panic!("{what}: MSL: {e}"));

        if is_matrix(&prelude) {
            continue;
        }
        let mut hlsl = String::new();
        let options = back::hlsl::Options {
            shader_model: back::hlsl::ShaderModel::V6_2,
            fake_missing_bindings: true,
            ..Default::default()
        };
        back::hlsl::Writer::new(&mut hlsl, &options, &Default::default())
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{what}: HLSL: {e}"));

        // GLSL has no 64-bit integers in naga's ES target, the one wgpu's OpenGL backend uses.
        if !wide {
            let mut glsl = String::new();
            let options = back::glsl::Options {
                version: back::glsl::Version::new_gles(320),
                ..Default::default()
            };
            let pipeline = back::glsl::PipelineOptions {
                shader_stage: naga::ShaderStage::Compute,
                entry_point: spec.name.into(),
                multiview: None,
            };
            back::glsl::Writer::new(
                &mut glsl,
                &module,
                &info,
                &options,
                &pipeline,
                Default::default(),
            )
            .unwrap_or_else(|e| panic!("{what}: GLSL: {e}"))
            .write()
            .unwrap_or_else(|e| panic!("{what}: GLSL: {e}"));
        }
    }
}

/// The pieces that a kernel's file says it is put together from, in order: alternatives at each place, `nothing` among them
/// where some variants have none.
fn listed(body: &str) -> Result<Vec<Vec<&str>>, String> {
    const START: &str = "\n// Pieces: ";
    let (_, rest) = body.split_once(START).ok_or("the file does not list its pieces")?;
    let (list, _) = rest.split_once(".\n").ok_or("the list of pieces has no end")?;
    Ok(list
        .split(',')
        .map(|place| place.split('|').map(|name| name.trim_matches(['/', ' ', '\n'])).collect())
        .collect())
}

/// Whether variants are put together from what a kernel's file lists, and whether all of that is used.
fn check_pieces(body: &str, variants: &[Vec<&str>]) -> Result<(), String> {
    let places = listed(body)?;
    let mut unused: BTreeSet<(usize, &str)> = (0..)
        .zip(&places)
        .flat_map(|(i, place)| place.iter().map(move |&name| (i, name)))
        .collect();
    for pieces in variants {
        let mut rest = pieces.iter();
        let mut next = rest.next();
        for (i, place) in places.iter().enumerate() {
            match next {
                Some(&name) if place.contains(&name) => {
                    unused.remove(&(i, name));
                    next = rest.next();
                }
                _ if place.contains(&"nothing") => {
                    unused.remove(&(i, "nothing"));
                }
                found => return Err(format!("{place:?} is listed, {found:?} composed")),
            }
        }
        if let Some(name) = next {
            return Err(format!("{name} is composed and not listed"));
        }
    }
    match unused.first() {
        Some((_, name)) => Err(format!("{name} is listed, and no variant uses it there")),
        None => Ok(()),
    }
}

#[test]
fn lines_are_short() {
    let long =
        |wgsl: &str| wgsl.lines().find(|line| line.chars().count() > 110).map(str::to_string);
    for spec in SPECS {
        for text in (spec.variants)().into_iter().map(|p| p.text).chain([spec.body.to_string()]) {
            assert_eq!(long(&text), None, "{}: longer than 110 columns", spec.name);
        }
    }
    assert!(long(&"x".repeat(111)).is_some());
}

#[test]
fn every_kernel_lists_its_pieces() {
    for spec in SPECS {
        let variants: Vec<_> = (spec.variants)().into_iter().map(|p| p.pieces).collect();
        if let Err(e) = check_pieces(spec.body, &variants) {
            panic!("{}: {e}", spec.name);
        }
    }
}

#[test]
fn a_wrong_list_of_pieces_is_noticed() {
    let file = |list: &str| format!("// out = x\n// Pieces: {list}.\n\nstruct Params {{}}\n");
    let variants = [vec!["a/x", "a/y"], vec!["a/x", "a/z", "a/w"]];
    assert_eq!(check_pieces(&file("a/x, a/y | a/z,\n//   a/w | nothing"), &variants), Ok(()));
    for wrong in [
        "a/x, a/y, a/w | nothing",                 // one is missing
        "a/x, a/y | a/z",                          // the last is missing
        "a/y | a/z, a/x, a/w | nothing",           // another order
        "a/x, a/y | a/z, a/w",                     // always there
        "a/x, a/y | a/z | a/v, a/w | nothing",     // an alternative that nobody uses
        "a/x | nothing, a/y | a/z, a/w | nothing", // nothing that never is
    ] {
        assert!(check_pieces(&file(wrong), &variants).is_err(), "{wrong}");
    }
    assert!(check_pieces("// out = x\n\nstruct Params {}\n", &variants).is_err());
}

/// Names of the WGSL files in a folder and those below, as `folder/stem`.
fn files(folder: &Path, prefix: &str, into: &mut Vec<String>) {
    for entry in folder.read_dir().expect("a folder").map(|e| e.expect("an entry").path()) {
        let stem = entry.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if entry.is_dir() {
            files(&entry, &format!("{prefix}{stem}/"), into);
        } else {
            into.push(format!("{prefix}{stem}"));
        }
    }
}

#[test]
fn every_piece_is_used_and_has_a_name_of_its_own() {
    let mut pieces = vec![];
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders/lib"), "", &mut pieces);
    assert!(pieces.len() > 30, "{pieces:?}");
    let used: BTreeSet<_> =
        SPECS.iter().flat_map(|s| (s.variants)()).flat_map(|p| p.pieces).collect();
    let mut stems: BTreeSet<_> = SPECS.iter().map(|s| s.name).collect();
    for piece in &pieces {
        assert!(used.contains(piece.as_str()), "no kernel uses {piece}");
        let stem = piece.rsplit('/').next().unwrap_or_default();
        assert!(stems.insert(stem), "{piece}: its name is taken");
    }
}

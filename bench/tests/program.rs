//! The program `wgmoe-bench` from outside. Its own tests are with its sources.
use std::process::{Command, Output};

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wgmoe-bench")).args(args).output().expect("it starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn devices_are_listed() {
    let output = bench(&["devices"]);
    let text = text(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    match wgmoe::Gpu::new() {
        Ok(gpu) => {
            let about = text.split(&gpu.info.name).nth(1).expect("the adapter of the other tests");
            let usable = about.lines().find(|line| line.trim_start().starts_with("usable"));
            assert!(usable.is_some_and(|line| line.contains("yes")), "{text}");
        }
        Err(e) if std::env::var_os("MOE_REQUIRE_GPU").is_some() => panic!("{e}"),
        Err(_) => assert!(!text.is_empty()),
    }
}

#[test]
fn without_adapters_the_way_to_one_is_named() {
    for args in [&["run", "--quick"][..], &["run", "--quick", "--all"], &["devices"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_wgmoe-bench"))
            .args(args)
            // A backend that does not exist here, and so no adapter.
            .envs([("WGPU_BACKEND", "vulkan"), ("VK_DRIVER_FILES", "/nonexistent")])
            .output()
            .expect("it starts");
        let said = text(&output.stdout) + &text(&output.stderr);
        // Where Vulkan is built into the system, the variables hide nothing.
        if cfg!(target_os = "linux") {
            assert!(said.contains("scripts/with-vulkan"), "{args:?}: {said}");
            assert_eq!(output.status.success(), args[0] == "devices", "{args:?}: {said}");
        }
    }
}

#[test]
fn errors_are_said_and_nothing_is_written() {
    let folder = std::env::temp_dir().join(format!("wgmoe-bench-program-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    std::fs::write(path("cut.json"), "{\"format\": \"wgmoe-bench\", \"version\": 1, \"adap")
        .unwrap();
    std::fs::write(path("new.json"), "{\"format\": \"wgmoe-bench\", \"version\": 99}").unwrap();
    std::fs::write(path("old.json"), "{\"format\": \"wgmoe-bench\", \"version\": 0}").unwrap();
    for (args, reason) in [
        (["report", &path("cut.json"), "-o", &path("r.html")], "breaks off"),
        (["report", &path("new.json"), "-o", &path("r.html")], "use a newer wgmoe-bench"),
        (["report", &path("old.json"), "-o", &path("r.html")], "older than the version 1"),
        (["report", &path("none.json"), "-o", &path("r.html")], "none.json"),
        (["run", "--quick", "--adapter", "no such adapter"], "no adapter `no such adapter`"),
        (["run", "--quick", "--minutes", "-1"], "minutes"),
    ] {
        let output = bench(&args);
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{args:?}");
        assert!(said.contains(reason), "{args:?}: {said:?} should say {reason:?}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
    assert!(!folder.join("r.html").exists());
    std::fs::remove_dir_all(folder).unwrap();
}

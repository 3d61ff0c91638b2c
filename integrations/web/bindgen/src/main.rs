//! `bindgen FILE.wasm FOLDER`: makes of a compiled library the WebAssembly that a browser loads, and the
//! JavaScript that calls it. The same as `wasm-bindgen --target web --no-typescript`, without installing it.
use wasm_bindgen_cli_support::Bindgen;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [wasm, folder] = &arguments[..] else {
        eprintln!("usage: bindgen FILE.wasm FOLDER");
        std::process::exit(2);
    };
    let mut bindgen = Bindgen::new();
    bindgen.input_path(wasm).typescript(false).remove_name_section(true);
    if let Err(e) = bindgen.web(true).and_then(|bindgen| bindgen.generate(folder)) {
        eprintln!("bindgen: {e:?}");
        std::process::exit(1);
    }
}

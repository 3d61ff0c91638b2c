//! Integration tests, one binary.
mod assign;
mod cases;
mod combine;
mod common;
mod errors;
mod expert_choice;
mod expert_union;
mod gather;
mod golden;
mod golden_file;
mod layer;
mod noop;
mod plan;
mod profile;
mod scores;
mod shaders;
mod token_choice;

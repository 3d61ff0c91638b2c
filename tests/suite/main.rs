//! Integration tests, one binary.
mod common;
mod coreset;
mod shaders;

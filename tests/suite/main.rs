//! Integration tests, one binary.
mod common;
mod layer;
mod shaders;

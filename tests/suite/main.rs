//! Integration tests, one binary.
mod common;
mod shaders;

//! Integration tests, one binary.
mod common;
mod schedule;
mod shaders;

//! Integration tests, one binary.
mod capacity;
mod common;
mod schedule;
mod shaders;

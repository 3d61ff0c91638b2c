//! Integration tests, one binary.
mod common;
mod coreset;
mod golden_blocks;
mod sequence_top;
mod shaders;
mod union_mean;

//! Hands the loader's layout to the linker.

#[path = "../bare.rs"]
mod bare;

fn main() {
    bare::link(Some("linker.ld"), &[]);
}

//! Hands the program's layout to the linker: static, at a fixed address.

#[path = "../bare.rs"]
mod bare;

fn main() {
    bare::link(None, &["-Ttext-segment=0x08048000", "-zstack-size=0"]);
}

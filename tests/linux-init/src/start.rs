//! From the kernel's stack to Rust.

#![expect(
    unsafe_code,
    reason = "UNSAFETY: the stack as the kernel fills it, a panic handler's end"
)]

use crate::console::{end, line};
use core::arch::naked_asm;
use core::ffi::{CStr, c_char};

/// Where the kernel starts the program.
///
/// In: ESP: the number of arguments, then their addresses, as the kernel leaves them. Out: never. The stack is aligned to 16 bytes,
/// as the C convention wants it.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!(
        "xor ebp, ebp",
        "mov eax, esp",
        "and esp, -16",
        "sub esp, 12",
        "push eax",
        "call {main}",
        "ud2",
        main = sym main,
    )
}

/// The words that the program was started with: its arguments, and behind them its environment.
#[derive(Clone, Copy)]
pub(crate) struct Arguments {
    first: *const *const c_char,
    count: usize,
}

/// A word.
///
/// # Safety
///
/// It ends in a zero, and stays.
unsafe fn word(address: *const c_char) -> Option<&'static str> {
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(address) }.to_str().ok()
}

impl Arguments {
    /// An argument by its place; 0 is the program's name.
    pub(crate) fn get(&self, index: usize) -> Option<&'static str> {
        if index >= self.count {
            return None;
        }
        // SAFETY: the kernel's promise: so many addresses of texts that end in a zero.
        unsafe { word(*self.first.add(index)) }
    }

    /// Where the words of the environment are.
    fn environment(&self) -> impl Iterator<Item = *const c_char> {
        // SAFETY: the kernel's promise: behind the arguments' null come addresses of such texts too, and another null.
        let address = |index| unsafe { *self.first.add(self.count + 1 + index) };
        (0..).map(address).take_while(|address| !address.is_null())
    }

    /// What the kernel says by the number of an entry of its vector, behind arguments and environment.
    pub(crate) fn auxiliary(&self, wanted: u32) -> Option<u32> {
        // SAFETY: the kernel's promise: behind the environment's null come pairs of numbers; the last has the number 0.
        unsafe {
            let mut word =
                self.first.cast::<u32>().add(self.count + 1 + self.environment().count() + 1);
            while word.read() != 0 {
                if word.read() == wanted {
                    return Some(word.add(1).read());
                }
                word = word.add(2);
            }
        }
        None
    }

    /// What follows a key such as `forks=`.
    ///
    /// Kernels make arguments of the words behind ` -- `. Linux before 3.15 does not know that sign, and puts what it does not know and that
    /// has a `=` into the environment.
    pub(crate) fn value(&self, key: &str) -> Option<&'static str> {
        let arguments = (1..self.count).filter_map(|index| self.get(index));
        // SAFETY: the kernel's promise, as above.
        let environment = self.environment().filter_map(|address| unsafe { word(address) });
        arguments.chain(environment).find_map(|word| word.strip_prefix(key))
    }
}

extern "C" fn main(stack: *const u32) -> ! {
    // SAFETY: the kernel's promise.
    let arguments = unsafe { Arguments { first: stack.add(1).cast(), count: *stack as usize } };
    crate::suite::run(arguments)
}

#[panic_handler]
fn panic(information: &core::panic::PanicInfo<'_>) -> ! {
    line!("{information}");
    end(false)
}

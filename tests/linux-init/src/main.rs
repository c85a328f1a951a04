//! The first program of a Linux guest, and its only one: small tests of what a kernel does for programs.
//!
//! It is started as `/init` from an initramfs. Each test says one line, `linux: test NAME ok` or why not. The last line is
//! `linux: all N tests passed`, or how many did not, and the verdict ends QEMU through its exit device.
//!
//! The kernel's command line passes words behind ` -- `, or as kernels before 3.15 do it: `forks=N` and `execs=N` let it start so many processes more, and `protects=N`
//! change protections in so many rounds more, so that two runs tell what one costs; `costs` lets it say how long the kernel's operations
//! take; `only=NAME` runs one test; `end=power-off` and `end=restart` let the kernel end the machine.
//!
//! - `start`: from the kernel's stack to [`main`],
//! - `system`: system calls of the 32-bit interface, by `int 80h`,
//! - `console`: lines, the end,
//! - `costs`: what operations take,
//! - `memory`, `processes`, `signals`, `threads`, `processor`, `files`: the tests.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod costs;
#[cfg(target_os = "none")]
mod files;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod processes;
#[cfg(target_os = "none")]
mod processor;
#[cfg(target_os = "none")]
mod signals;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
mod system;
#[cfg(target_os = "none")]
mod threads;

#[cfg(target_os = "none")]
mod suite {
    use crate::console::{end, end_by_kernel, line};
    use crate::start::Arguments;
    use crate::{costs, files, memory, processes, processor, signals, threads};

    /// Why a test failed, and the number that was seen.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Failure(pub(crate) &'static str, pub(crate) i32);

    /// What a test comes to.
    pub(crate) type Verdict = Result<(), Failure>;

    /// A test.
    type Test = fn() -> Verdict;

    /// Fails unless a condition holds: `check!(condition, "what is wrong", number)`.
    macro_rules! check {
        ($condition:expr, $reason:literal) => {
            $crate::suite::check!($condition, $reason, 0)
        };
        ($condition:expr, $reason:literal, $number:expr) => {
            if !$condition {
                return Err($crate::suite::Failure($reason, $number as i32));
            }
        };
    }
    pub(crate) use check;

    /// The tests.
    const TESTS: [(&str, Test); 25] = [
        ("fork", || processes::forks(64)),
        ("exec", || processes::execs(32)),
        ("crowd", processes::crowd),
        ("copy-on-write", memory::copy_on_write),
        ("mmap", memory::map_many),
        ("mprotect", || memory::protects(8)),
        ("mremap", memory::remap),
        ("brk", memory::heap),
        ("stack", memory::stack),
        ("shared-memory", memory::shared),
        ("pipe", files::pipe),
        ("file-mapping", files::mapping),
        ("proc", files::proc),
        ("poll", files::poll),
        ("signal", signals::handlers),
        ("write-fault", signals::write_fault),
        ("exceptions", signals::exceptions),
        ("frames", signals::frames),
        ("timer", signals::timer),
        ("sleep", threads::sleep),
        ("threads", threads::threads),
        ("futex", threads::futex),
        ("fpu", processor::floating_point),
        ("segments", processor::segments),
        ("code", processor::code),
    ];

    /// Runs what was asked for, and ends the machine.
    pub(crate) fn run(arguments: Arguments) -> ! {
        if let Some(status) = processes::as_child(&arguments) {
            crate::system::exit(status);
        }
        files::mount();
        let number = |key: &str| arguments.value(key).and_then(|text| text.parse::<u32>().ok());
        let only = arguments.value("only=");
        let (mut passed, mut failed) = (0, 0);
        for (name, test) in TESTS.iter().filter(|(name, _)| only.is_none_or(|only| *name == only)) {
            match test() {
                Ok(()) => {
                    line!("test {name} ok");
                    passed += 1;
                }
                Err(Failure(reason, number)) => {
                    line!("test {name} FAILED: {reason} ({number}, {number:#x})");
                    failed += 1;
                }
            }
        }
        for (count, work) in [
            (number("forks="), processes::forks as fn(u32) -> Verdict),
            (number("execs="), processes::execs),
            (number("protects="), memory::protects),
        ] {
            if count.is_some_and(|count| work(count).is_err()) {
                failed += 1;
            }
        }
        if arguments.value("costs").is_some() {
            failed += costs::say(&arguments);
        }
        if failed == 0 && passed != 0 {
            line!("all {passed} tests passed");
        } else {
            line!("{failed} of {} tests FAILED", passed + failed);
        }
        if let Some(word) = arguments.value("end=") {
            end_by_kernel(word);
        }
        end(failed == 0 && passed != 0)
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    println!("the program is built by `cargo xtask run --on reference --kernel`");
}

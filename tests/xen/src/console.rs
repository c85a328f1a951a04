//! Lines on Xen's console.

use crate::hypercall;
use core::fmt;

/// The console as a sink for `write!`.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        hypercall::write(text);
        Ok(())
    }
}

/// Writes a line, under the loader's name.
macro_rules! line {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        let mut console = $crate::console::Console;
        // The console never fails.
        let _ = console.write_str("loader: ");
        let _ = writeln!(console, $($argument)*);
    }};
}
pub(crate) use line;

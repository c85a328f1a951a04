//! A sign of life on the error output while something takes its time.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// A line that moves on a terminal; elsewhere one plain line when the work starts.
#[derive(Debug)]
pub struct Progress {
    title: String,
    bar: ProgressBar,
}

impl Progress {
    /// Starts to show `title`.
    #[must_use]
    pub fn start(title: impl Into<String>) -> Self {
        let title = title.into();
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{spinner} {prefix} {wide_msg:.dim}");
            let bar = ProgressBar::new_spinner().with_prefix(title.clone());
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        } else {
            anstream::eprintln!("{title}");
            ProgressBar::hidden()
        };
        Self { title, bar }
    }

    /// Says what it is at, behind the title.
    pub fn at(&self, step: &str) {
        self.bar.set_message(step.trim().to_owned());
    }

    /// What is shown.
    #[must_use]
    pub fn title(&self) -> &str {
        &self.title
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

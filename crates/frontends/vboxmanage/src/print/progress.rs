//! The progress bar.

/// Steps of the bar for a percentage that has grown from `last` to `now`. The end of the line is `finish`'s.
pub fn steps(last: u32, now: u32) -> String {
    (last / 10 + 1..=now / 10).filter(|tens| *tens < 10).map(|tens| format!("{}%...", tens * 10)).collect()
}

/// A line of the detailed report. `operation` counts from 0.
pub fn detailed(
    operation: u32,
    count: u32,
    description: &str,
    operation_percent: u32,
    percent: u32,
    seconds_left: i32,
) -> String {
    format!(
        "({}/{count}) {description} {operation_percent:02}% => {percent:02}% ({seconds_left} s remaining)\n",
        operation + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_steps_are_made_up_for() {
        assert_eq!(steps(0, 9), "");
        assert_eq!(steps(0, 35), "10%...20%...30%...");
        assert_eq!(steps(35, 39), "");
        assert_eq!(steps(39, 100), "40%...50%...60%...70%...80%...90%...");
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Alarms of which one is always about to go off, for which the kernel's alarm timer refuses to suspend.

use std::io;

use anyhow::Result;
use rustix::time::{
    Itimerspec,
    TimerfdClockId,
    TimerfdFlags,
    TimerfdTimerFlags,
    Timespec,
    timerfd_create,
    timerfd_settime, //
};

/// How many there are, one a second. Below two seconds from the next one suspend is refused.
const COUNT: i64 = 120;

/// Sets the alarms, says `armed`, and leaves them on until the end of standard input.
///
/// One that repeats itself would not do: it does so when it is read, and its reader may be frozen.
pub fn hold() -> Result<()> {
    let mut timers = Vec::new();
    for second in 1..=COUNT {
        let timer = timerfd_create(TimerfdClockId::BoottimeAlarm, TimerfdFlags::empty())?;
        let setting = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: second,
                tv_nsec: 0,
            },
        };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &setting)?;
        timers.push(timer);
    }
    println!("armed");
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    Ok(())
}

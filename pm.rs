// SPDX-License-Identifier: GPL-2.0

//! Suspend, reset, and the way back.
//!
//! A reset device has forgotten everything: that is what a host is allowed to do, and what QEMU
//! does. Whatever reset it, the way back is the same, and it is in this file: [`quiesce`] brings
//! the driver to rest and, where the host has the feature, asks it to keep what it has;
//! [`freeze`] lets go of the device; [`restore`] takes it up again; [`revive`] finds out what
//! the host still has, brings back what it has not, and turns the display on.
//!
//! Three roads lead here. The transport calls [`freeze`] and [`restore`] when it resets the device
//! for system sleep; it does not say what for, and where the PCI function keeps its state over D3
//! it does not call at all. The PM core calls [`suspend`] before and [`resume`] after that, and
//! says what for. Each of them does what is left to do.
//!
//! The transport calls [`reset_prepare`] and [`restore`] when somebody wants the device reset, and
//! [`config_changed`] does it by itself for a device that asks for it, or breaks its queue. The
//! display stays on then, and user space is awake: whoever wants something of the device waits at
//! the gate.
//!
//! | what happened | what the host is asked to keep | what is done |
//! |---|---|---|
//! | suspend to RAM or idle, with FREEZING | everything | verify, or else reset and recover |
//! | suspend to RAM or idle | nothing | recover |
//! | the same, and the device was not reset | as above | verify, or else reset and recover |
//! | hibernation, in all of its phases | nothing | recover |
//! | a reset of the PCI function | nothing | recover |
//! | a device that needs a reset | nothing | reset and recover |

use core::mem;
use kernel::{
    device,
    drm::wedge,
    prelude::*,
    sync::{
        atomic::Relaxed,
        lock::mutex::MutexGuard, //
    },
    time::{
        Instant,
        Monotonic, //
    },
    virtio::{
        self,
        PmPhase, //
    }, //
};

use crate::{
    command,
    display,
    driver::Device,
    object::{
        Screens,
        SENTINEL, //
    },
    queue::{
        is_lost,
        Gate,
        Tally,
        Who,
        CTRL, //
    },
    uapi, //
};

/// Where the driver stands between suspend and resume; see [`State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Awake,
    /// The display is off, the gate is closed, the queues are idle. The device is untouched.
    Quiet,
    /// The device has been reset and the queues are gone.
    Down,
    /// The device did not come back. It has been reset and the queues are gone, here too.
    Failed,
}

/// Whether the host has the sentinel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sentinel {
    Absent,
    Present,
    /// It was asked to create or destroy it, and has not answered.
    Unknown,
}

impl Sentinel {
    /// What is known after the host was asked for a `change` that leads to `goal`.
    fn after(goal: Self, change: &Result) -> Self {
        match change {
            Ok(()) => goal,
            Err(e) if *e == ETIMEDOUT => Self::Unknown,
            Err(_) => Self::Absent,
        }
    }
}

/// How often in a row the driver resets a device that misbehaves.
const RESETS_MAX: u32 = 3;

/// For how long a device has to behave to be forgiven, in milliseconds.
const RESETS_FORGIVEN_MS: i64 = 10_000;

/// Bounds how often the driver resets the device by itself: one that misbehaves at once again must
/// not keep it busy for ever.
struct Resets {
    count: u32,
    last: Option<Instant<Monotonic>>,
}

impl Resets {
    const fn new() -> Self {
        Self {
            count: 0,
            last: None,
        }
    }

    /// Returns the number of the next reset in a row, if there is to be one. `idle` is how long ago
    /// the last one was, if there was one.
    fn next(count: u32, idle: Option<i64>) -> Option<u32> {
        match idle {
            Some(idle) if idle < RESETS_FORGIVEN_MS => (count < RESETS_MAX).then_some(count + 1),
            _ => Some(1),
        }
    }

    /// Counts a reset, if there may be another one.
    fn allow(&mut self) -> bool {
        let idle = self.last.map(|last| last.elapsed().as_millis());
        let Some(count) = Self::next(self.count, idle) else {
            return false;
        };

        self.count = count;
        self.last = Some(Instant::now());
        true
    }
}

/// What is remembered between suspend and resume, behind a lock of its own.
pub(crate) struct State {
    stage: Stage,
    /// What the PM core said was to come; nothing where the transport acts on its own account.
    phase: Option<PmPhase>,
    /// The host has promised to keep everything.
    promised: bool,
    sentinel: Sentinel,
    /// The display has been turned off and waits to be turned on again; this is what it showed.
    display: Option<Screens>,
    /// The host was asked for its displays in vain.
    unasked: bool,
    /// Displays have changed, which user space has not been told.
    changed: bool,
    resets: Resets,
}

impl State {
    pub(crate) const fn new() -> Self {
        Self {
            stage: Stage::Awake,
            phase: None,
            promised: false,
            sentinel: Sentinel::Absent,
            display: None,
            unasked: false,
            changed: false,
            resets: Resets::new(),
        }
    }
}

/// What there is to do to get the host's resources back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// The host may have everything: ask, and recover if not.
    Verify,
    /// The host has nothing.
    Recover,
    /// The host has been given no reason to forget anything.
    Keep,
}

impl Plan {
    /// `reset`: the device has been reset; `promised`: the host has said that it keeps everything
    /// all the same; `sentinel`: there is something to ask for.
    fn new(reset: bool, promised: bool, sentinel: bool) -> Self {
        match (reset, promised, sentinel) {
            (false, _, false) => Plan::Keep,
            (false, _, true) | (true, true, true) => Plan::Verify,
            (true, _, _) => Plan::Recover,
        }
    }
}

/// Whether a host with the feature is asked to keep everything. When the guest hibernates, the host
/// process is likely to end; what it were to keep would be in the way.
fn asks_to_keep(freezing: bool, phase: Option<PmPhase>) -> bool {
    freezing && phase == Some(PmPhase::Suspend)
}

/// Turns the display off, and brings the driver to rest. The device is not reset, and what the host
/// has stays.
///
/// On error everything is as before.
fn quiesce(drm: &Device) -> Result<MutexGuard<'_, State>> {
    let mut state = drm.pm.lock();

    if !matches!(state.stage, Stage::Awake | Stage::Failed) {
        return Ok(state);
    }

    let queue = &drm.queue;
    let display = match state.display.take() {
        // Before a reset by which the device came back, while everything else goes to sleep.
        Some(screens) => Some(screens),
        None if drm.has_display() => {
            let screens = *drm.screens.lock();

            // Not under the lock: a device that breaks now is mended meanwhile, by
            // `config_changed`.
            drop(state);
            drm.suspend().inspect_err(|e| {
                dev_err!(
                    drm.as_ref(),
                    "*ERROR* cannot suspend the display: {:?}\n",
                    e
                );
            })?;
            state = drm.pm.lock();
            Some(screens)
        }
        None => None,
    };

    if state.stage == Stage::Awake {
        mend(drm, &mut state);
    }
    state.display = display;
    if state.stage == Stage::Failed {
        // There is nothing to quiesce, and another chance to come. What the host has promised it
        // may still keep.
        queue.set_gate(Gate::Frozen);
        state.stage = Stage::Down;
        return Ok(state);
    }

    let destroy = command::resource_unref(SENTINEL);
    let create = command::resource_create_2d(SENTINEL, uapi::FORMAT_HOST_XRGB8888, 1, 1);

    if state.sentinel == Sentinel::Unknown {
        // Refused where it is not there, which is as good.
        let _ = queue.ask(&destroy, Who::Pm);
    }

    // Always: whether the device will be reset is not known yet, another driver may abort this.
    let created = queue.ask(&create, Who::Pm);
    // That is when the answer has come, if it ever does.
    let drained = queue.drain();
    let created = created.and_then(|question| question.answer().map(drop));

    state.sentinel = Sentinel::after(Sentinel::Present, &created);
    if !drained {
        // One that has to be reset is, or says so again when we are back.
        if !queue.needs_reset() {
            dev_err!(
                drm.as_ref(),
                "*ERROR* the host does not answer, suspending all the same\n"
            );
        }
    } else if state.sentinel == Sentinel::Present
        && asks_to_keep(drm.freezing.load(Relaxed), state.phase)
    {
        state.promised = match queue.call(&command::status_freezing(true), Who::Pm) {
            Ok(_) => true,
            Err(e) => {
                dev_info!(
                    drm.as_ref(),
                    "the host did not promise to keep its resources: {:?}\n",
                    e
                );
                // It may have heard, and must then be told when we are back.
                e == ETIMEDOUT || e == ECANCELED
            }
        };
    }
    queue.set_gate(Gate::Frozen);
    state.stage = Stage::Quiet;
    Ok(state)
}

/// The PM core is about to suspend; the device is untouched yet.
pub(crate) fn suspend(drm: &Device, phase: PmPhase) -> Result {
    drm.pm.lock().phase = Some(phase);
    // The PM core does not call `resume` for a device that failed to suspend.
    quiesce(drm)
        .map(drop)
        .inspect_err(|_| drm.pm.lock().phase = None)
}

/// The transport is about to let the device sleep, or to reset it.
pub(crate) fn freeze(drm: &Device) -> Result {
    let mut state = quiesce(drm)?;

    // Whatever is still in the ring has had its time.
    drm.queue.stop(false, Gate::Frozen);
    state.stage = Stage::Down;
    Ok(())
}

/// The transport is about to reset the device, while everybody is awake.
pub(crate) fn reset_prepare(drm: &Device) {
    let mut state = drm.pm.lock();

    // What is lost is recovered, but there are hosts that look at commands while they reset.
    drm.queue.stop(true, Gate::Frozen);
    state.stage = Stage::Down;
}

/// The device has not come back from the reset that the transport wanted.
pub(crate) fn reset_failed(drm: &Device) {
    let mut state = drm.pm.lock();

    // If `restore` is what failed, it has said so.
    if state.stage == Stage::Down {
        wedge(drm, &mut state, EIO);
    }
}

/// The transport has reset the device and agreed on its features.
pub(crate) fn restore(drm: &Device, dev: &virtio::Device<device::Bound>) -> Result {
    come_up(drm, &mut drm.pm.lock(), || drm.queue.init_vqs(dev))
}

/// The PM core is done; the transport may have had nothing to do.
pub(crate) fn resume(drm: &Device, dev: &virtio::Device<device::Core<'_>>) -> Result {
    let mut state = drm.pm.lock();
    let result = match state.stage {
        Stage::Quiet => {
            come_back(drm, &mut state, false).inspect_err(|e| wedge(drm, &mut state, *e))
        }
        Stage::Awake => Ok(()),
        // The transport has nothing to do for a device that keeps its state, even if that is
        // wedged, or it has failed, and logged its own error.
        Stage::Down => come_up(drm, &mut state, || {
            dev.reset()?;
            drm.queue.init_vqs(dev)
        }),
        // In `restore`, just now.
        Stage::Failed => Err(EIO),
    };

    state.phase = None;
    drop(state);
    turn_on(drm);
    result
}

/// Turns the display on again, if it was turned off and the device works, and tells user space of
/// other displays.
///
/// Not under the lock, and not before the virtio core allows configuration changes again, as it
/// does after [`restore`]: a device that breaks now is mended meanwhile, by [`config_changed`].
fn turn_on(drm: &Device) {
    if drm.pm.lock().display.take().is_some() {
        // The device works; user space can still turn on what was not.
        if let Err(e) = drm.resume() {
            dev_err!(drm.as_ref(), "*ERROR* cannot resume the display: {:?}\n", e);
        }
    }
    if mem::take(&mut drm.pm.lock().changed) {
        drm.hotplug_event();
    }
}

/// The configuration of the device has changed: if the device asks for a reset by that, or has
/// broken its queue, resets it and brings everything back; if its displays have changed, asks for
/// them. Nobody else does at the same time: of two answers the later one has to win.
///
/// Does nothing while the device is away. Who brings it back looks at all of that, too.
///
/// Returns whether user space is to be told of other displays.
pub(crate) fn config_changed(drm: &Device) -> bool {
    let mut state = drm.pm.lock();

    if state.stage == Stage::Awake {
        mend(drm, &mut state);
    }
    if state.stage == Stage::Awake && (display::take_event(drm) || state.unasked) {
        let asked = refresh(drm, &mut state);

        // Even where nothing new was found out: user space may know more.
        state.changed |= asked != Err(ENODEV);
    }
    mem::take(&mut state.changed)
}

/// Asks the host for its displays.
fn refresh(drm: &Device, state: &mut State) -> Result {
    if !drm.has_display() {
        return Err(ENODEV);
    }

    let changed = display::refresh(drm);

    state.unasked = changed.is_err();
    state.changed |= changed?;
    Ok(())
}

fn mend(drm: &Device, state: &mut State) {
    if !drm.queue.needs_reset() {
        return;
    }
    dev_warn!(drm.as_ref(), "the device does not work, resetting it\n");

    let result = if state.resets.allow() {
        drm.queue
            .restart()
            .and_then(|()| come_back(drm, state, true))
    } else {
        Err(EIO)
    };

    if let Err(e) = result {
        wedge(drm, state, e);
    }
}

/// Brings a device back that has been reset, and has no queues before `connect` has found them.
fn come_up(drm: &Device, state: &mut State, connect: impl FnOnce() -> Result) -> Result {
    connect()
        .and_then(|()| come_back(drm, state, true))
        .inspect_err(|e| wedge(drm, state, *e))
}

/// Brings a device back that has queues. One that breaks them while it is brought back, or has done
/// so while nobody looked, has to be reset, and gets another chance.
fn come_back(drm: &Device, state: &mut State, mut reset: bool) -> Result {
    // Bounded here, too: one that takes its time to misbehave is forgiven each time.
    for _ in 0..=RESETS_MAX {
        if !drm.queue.needs_reset() {
            let result = revive(drm, state, reset);

            // Even after success: `config_changed` does nothing while the device is away.
            if !drm.queue.needs_reset() {
                return result;
            }
        }
        if !state.resets.allow() {
            break;
        }
        drm.queue.restart()?;
        reset = true;
    }
    Err(EIO)
}

/// Nothing more is expected of the device until it is reset.
fn wedge(drm: &Device, state: &mut State, error: Error) {
    drm.queue.stop(false, Gate::Wedged);
    state.stage = Stage::Failed;
    // What the host may still keep is not what there will be then.
    state.sentinel = Sentinel::Absent;
    // Nothing will be seen, but clients must not be left suspended.
    if state.display.take().is_some() {
        let _ = drm.resume();
    }
    // Whatever it was then that went wrong.
    if drm.queue.is_gone() {
        return;
    }
    dev_err!(
        drm.as_ref(),
        "*ERROR* the device did not come back: {:?}\n",
        error
    );

    let methods = wedge::Recovery::REBIND | wedge::Recovery::BUS_RESET;

    if let Err(e) = drm.wedged_event(methods) {
        dev_err!(drm.as_ref(), "*ERROR* user space was not told: {:?}\n", e);
    }
}

/// Brings the host's side back and opens the gate. The queues work, and only we may use them.
fn revive(drm: &Device, state: &mut State, reset: bool) -> Result {
    let queue = &drm.queue;
    let plan = Plan::new(reset, state.promised, state.sentinel == Sentinel::Present);

    if reset && plan == Plan::Recover {
        state.sentinel = Sentinel::Absent;
    }

    // Not by a flush: there are hosts that flush what they do not have.
    let destroyed =
        (plan == Plan::Verify).then(|| queue.ask(&command::resource_unref(SENTINEL), Who::Pm));
    // What the host kept for nothing it may now forget, too.
    let told = mem::take(&mut state.promised)
        .then(|| queue.ask(&command::status_freezing(false), Who::Pm));

    queue.kick(CTRL);

    let mut mute = false;
    let kept = match destroyed {
        Some(question) => {
            let destroyed = question.and_then(|it| it.wait(queue, Who::Pm)).map(drop);

            state.sentinel = Sentinel::after(Sentinel::Absent, &destroyed);
            mute = destroyed == Err(ETIMEDOUT);
            destroyed.is_ok()
        }
        None => plan == Plan::Keep,
    };

    let promised = told.is_some();

    if let Some(question) = told {
        // Once is enough to wait in vain.
        let told = question.and_then(|it| match mute {
            true => it.answer(),
            false => it.wait(queue, Who::Pm),
        });

        if let Err(e) = told {
            // It is told again, if it has not heard of it.
            state.promised = is_lost(e) || e == ENOMEM;
            dev_err!(
                drm.as_ref(),
                "*ERROR* the host was not told of the resume: {:?}\n",
                e
            );
        }
        if plan == Plan::Verify && !kept {
            dev_warn!(drm.as_ref(), "the host did not keep its resources\n");
        }
    }
    if !kept && (promised || plan == Plan::Verify) {
        // It may have some of them. After a reset it has none, as everywhere else.
        queue.restart()?;
        if state.promised
            && queue
                .call(&command::status_freezing(false), Who::Pm)
                .is_ok()
        {
            // Unless it did not know until now that it need not keep them.
            state.promised = false;
            queue.restart()?;
        }
        state.sentinel = Sentinel::Absent;
    }

    let done = match state.phase {
        Some(_) => "resumed",
        None => "reset",
    };

    if plan == Plan::Keep {
        dev_info!(drm.as_ref(), "{}, the device was not reset\n", done);
    } else if kept {
        queue.trust();
        dev_info!(drm.as_ref(), "{}, the host kept its resources\n", done);
    } else {
        let screens = state.display.unwrap_or_else(|| *drm.screens.lock());
        let tally = Tally::new()?;
        let count = drm.resources.recover(&screens, &drm.dark, &tally)?;

        if !queue.wait_idle() {
            return Err(ETIMEDOUT);
        }
        match tally.failed() {
            0 => dev_info!(drm.as_ref(), "{}, {} resources recovered\n", done, count),
            failed => dev_err!(
                drm.as_ref(),
                "*ERROR* {}, {} commands to recover {} resources failed\n",
                done,
                failed,
                count
            ),
        }
    }

    queue.open();
    state.stage = Stage::Awake;
    let _ = refresh(drm, state);
    Ok(())
}

#[kunit_tests(virtgpu_rs_pm)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_asked_only_where_there_is_a_chance() {
        // Reset, and no promise: the host has nothing.
        assert_eq!(Plan::new(true, false, true), Plan::Recover);
        assert_eq!(Plan::new(true, false, false), Plan::Recover);
        // Reset, and a promise.
        assert_eq!(Plan::new(true, true, true), Plan::Verify);
        // Not reset: a suspend that was aborted, or a function that keeps its state.
        assert_eq!(Plan::new(false, false, true), Plan::Verify);
        assert_eq!(Plan::new(false, true, true), Plan::Verify);
        // Nothing to ask for.
        assert_eq!(Plan::new(false, true, false), Plan::Keep);
        assert_eq!(Plan::new(false, false, false), Plan::Keep);
        assert_eq!(Plan::new(true, true, false), Plan::Recover);
    }

    #[test]
    fn an_answer_that_does_not_come_says_nothing() {
        let after = Sentinel::after;

        assert_eq!(after(Sentinel::Present, &Ok(())), Sentinel::Present);
        assert_eq!(after(Sentinel::Absent, &Ok(())), Sentinel::Absent);
        assert_eq!(after(Sentinel::Present, &Err(EINVAL)), Sentinel::Absent);
        assert_eq!(after(Sentinel::Present, &Err(ETIMEDOUT)), Sentinel::Unknown);
        assert_eq!(after(Sentinel::Absent, &Err(ETIMEDOUT)), Sentinel::Unknown);
    }

    #[test]
    fn a_device_that_never_behaves_is_given_up() {
        let mut count = 0;

        for n in 1..=RESETS_MAX {
            let idle = (n > 1).then_some(0);
            count = Resets::next(count, idle).unwrap_or(0);
            assert_eq!(count, n);
        }
        assert_eq!(Resets::next(count, Some(RESETS_FORGIVEN_MS - 1)), None);
        assert_eq!(Resets::next(count, Some(RESETS_FORGIVEN_MS)), Some(1));
        assert_eq!(Resets::next(0, None), Some(1));
    }

    #[test]
    fn hibernation_never_asks_the_host_to_keep_anything() {
        for phase in [Some(PmPhase::Freeze), Some(PmPhase::PowerOff), None] {
            assert!(!asks_to_keep(true, phase));
        }
        assert!(asks_to_keep(true, Some(PmPhase::Suspend)));
        assert!(!asks_to_keep(false, Some(PmPhase::Suspend)));
    }
}

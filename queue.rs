// SPDX-License-Identifier: GPL-2.0

//! The engine: commands go to the host and answers come back.
//!
//! Every command stands before one gate, [`Gate`], and goes through one door, [`Queue::submit`] and
//! its like; only [`Queue::unref`], which must not fail, has one of its own.
//! What the host has been given is a [`Token`] in the virtqueue, and stays one until the host
//! returns it or the device has been reset; either way [`Token::complete`] runs, once, and that is
//! where answers are checked, waiters woken and memory released. Nothing is fire-and-forget: a
//! command that cannot be queued is an error where it was issued, one that the host refuses is an
//! error in the log, and in its waiter's hands if it has one.
//!
//! Whoever has to wait, for room in the ring, for the gate or for an answer, waits for
//! [`TIMEOUT_MS`] at the most, is woken when the gate moves, and holds nothing that completion
//! needs. Whoever cannot fail and waits for the host to be done with everything, or while the gate
//! is closed, gives it as long after each answer.
//!
//! The engine knows neither GEM nor KMS. Memory that must outlive a command is handed to it as
//! [`Held`] and dropped in a work item of its own, never in the one that completes commands.

use core::{
    mem,
    ops::ControlFlow, //
};
use kernel::{
    device,
    impl_has_work,
    new_condvar,
    new_spinlock,
    new_work,
    prelude::*,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        ArcBorrow,
        CondVar,
        SpinLock, //
    },
    time::{
        msecs_to_jiffies,
        Jiffies, //
    },
    virtio::{
        self,
        queue::{
            Answer,
            Payload,
            Response,
            ResponseBuf,
            Virtqueues, //
        }, //
    },
    workqueue::{
        self,
        Work,
        WorkItem, //
    }, //
};

use crate::{
    command::{
        self,
        Command, //
    },
    uapi, //
};

/// How long anybody waits for the host, in milliseconds.
pub(crate) const TIMEOUT_MS: u32 = 5000;

/// The queue for everything but the cursor.
pub(crate) const CTRL: usize = 0;
/// The fast lane for the cursor.
pub(crate) const CURSOR: usize = 1;

const NUM_QUEUES: usize = 2;

/// Whether commands may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Everybody may.
    Running,
    /// The device is about to be reset: only [`Who::Pm`] may, the others wait.
    Draining,
    /// The device sleeps, has been reset or has to be, or is being brought back: only [`Who::Pm`]
    /// may, the others wait.
    Frozen,
    /// The device did not come back, or misbehaved too often: nobody may, until it is reset.
    Wedged,
    /// The device is gone for good.
    Gone,
}

/// Who issues a command, which decides whether it passes the [`Gate`] and how it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// A system call; its waits end when the caller is killed.
    Ioctl,
    /// The kernel, on its own account or in a commit that cannot fail any more.
    Kernel,
    /// Suspend, resume and recovery, for which the gate is closed.
    Pm,
}

impl Gate {
    /// Decides: pass ([`ControlFlow::Continue`] with `true`), wait (with `false`), or go away.
    fn admit(self, who: Who) -> ControlFlow<Error, bool> {
        match (self, who) {
            (Gate::Running, _) => ControlFlow::Continue(true),
            (Gate::Draining | Gate::Frozen, Who::Pm) => ControlFlow::Continue(true),
            (Gate::Draining | Gate::Frozen, _) => ControlFlow::Continue(false),
            (Gate::Wedged, _) => ControlFlow::Break(EIO),
            (Gate::Gone, _) => ControlFlow::Break(ENODEV),
        }
    }

    /// Whether `self` may be followed by `next`. A device that is gone does not come back.
    fn may_become(self, next: Gate) -> bool {
        self != Gate::Gone || next == Gate::Gone
    }
}

/// What each queue's lock protects beside the queue.
pub(crate) struct QueueState {
    gate: Gate,
    /// How many tasks sleep on [`Engine::moved`] for this queue.
    sleepers: u32,
    /// How often something has come back.
    returned: u32,
    /// Somebody waited in vain for room, and nothing has come back since. Spares the others the
    /// same wait.
    stalled: bool,
    /// There may be something in [`Engine::limbo`] that the host can be told when there is room.
    owing: bool,
    /// The device has not been reset since its queues were found: it may access what it was given.
    exposed: bool,
}

impl QueueState {
    fn new() -> Self {
        Self {
            gate: Gate::Frozen,
            sleepers: 0,
            returned: 0,
            stalled: false,
            owing: false,
            exposed: false,
        }
    }

    /// Has everybody but [`Who::Pm`] wait for the reset that the device needs.
    fn shut(&mut self) {
        if self.gate == Gate::Running {
            self.gate = Gate::Frozen;
        }
    }

    /// Whether to go on with a `wait`, for room if the ring is `full`, or else before the gate.
    ///
    /// Errors: [`ETIMEDOUT`].
    fn may_wait(&mut self, full: bool, wait: &Wait) -> Result {
        let over = wait.left == 0;

        // Others may have taken the room that there was.
        self.stalled |= full && over && wait.since == self.returned;
        if over || full && self.stalled {
            return Err(ETIMEDOUT);
        }
        Ok(())
    }
}

/// What is done when the host is done with a command.
enum Done {
    /// Errors are logged.
    Log,
    /// Somebody waits.
    Reply(Arc<Reply>),
    /// Errors are counted, for somebody who waits for many commands at once.
    Tally(Arc<Tally>),
    /// The host has forgotten a resource, and the memory that it used can go.
    Release(KBox<Held>),
}

/// A command in the hands of the host.
pub(crate) struct Token {
    command: u32,
    expect: u32,
    done: Done,
}

impl Token {
    fn new<C: Command>(done: Done) -> Self {
        Self {
            command: C::TYPE,
            expect: C::OK,
            done,
        }
    }

    /// A token for a command that nobody waits for. An error is logged, and counted in `tally`.
    fn unattended<C: Command>(tally: Option<&Arc<Tally>>) -> Self {
        Self::new::<C>(tally.map_or(Done::Log, |tally| Done::Tally(tally.clone())))
    }

    /// A token that keeps memory alive until the host has forgotten it.
    fn release(held: KBox<Held>) -> Self {
        Self::new::<uapi::ResourceUnref>(Done::Release(held))
    }

    /// Whether the host has carried out a command that nobody waits for.
    fn is_routine(&self, answer: &Answer) -> bool {
        matches!(self.done, Done::Log | Done::Release(_))
            && command::check(answer.as_slice(), self.expect).is_ok()
    }

    /// Ends a command: the host has answered, or never will.
    fn complete(self, engine: &Engine, result: Result<&mut Answer>) {
        let result = result.and_then(|answer| {
            match command::check(answer.as_slice(), self.expect) {
                Ok(()) => Ok(answer),
                Err((error, ty)) => {
                    // Who waits has the error, and knows whether it is one.
                    if !matches!(self.done, Done::Reply(_)) {
                        engine.refused(self.command, ty);
                    }
                    Err(error)
                }
            }
        });

        match self.done {
            Done::Log => {}
            Done::Reply(reply) => *reply.lock() = Some(result.map(mem::take)),
            Done::Tally(tally) => {
                if result.is_err() {
                    tally.fail();
                }
            }
            Done::Release(held) => engine.release(held),
        }
    }
}

/// Where the answer is put that one task waits for.
type Reply = SpinLock<Option<Result<Answer>>>;

/// Counts the commands of a batch that failed. The batch is over when the queue has drained.
pub(crate) struct Tally {
    failed: Atomic<u32>,
}

impl Tally {
    /// Starts a batch.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(
            Self {
                failed: Atomic::new(0),
            },
            GFP_KERNEL,
        )?)
    }

    /// Counts a command that could not even be issued.
    pub(crate) fn fail(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// How many of the batch failed so far.
    pub(crate) fn failed(&self) -> u32 {
        self.failed.load(Relaxed)
    }
}

/// What a resource was made of, which must not be dropped before the host has forgotten the
/// resource, in a list of such things.
pub(crate) struct Held<T: ?Sized + Send = dyn Send> {
    next: Option<KBox<Held>>,
    resource: u32,
    _what: T,
}

impl Held {
    /// Puts `what` the `resource` was made of into memory that was allocated earlier.
    pub(crate) fn new<T: Send + 'static>(
        room: KBox<mem::MaybeUninit<Held<T>>>,
        resource: u32,
        what: T,
    ) -> KBox<Self> {
        room.write(Held {
            next: None,
            resource,
            _what: what,
        })
    }
}

impl<T: ?Sized + Send> Drop for Held<T> {
    fn drop(&mut self) {
        // One by one, and not recursively.
        let mut next = self.next.take();

        while let Some(mut held) = next {
            next = held.next.take();
        }
    }
}

/// What is shared by everybody who talks to one device.
#[pin_data]
pub(crate) struct Engine {
    /// For messages.
    dev: ARef<device::Device>,
    #[pin]
    dequeue_ctrl: Work<Virtqueues<Engine, NUM_QUEUES>, 0>,
    #[pin]
    dequeue_cursor: Work<Virtqueues<Engine, NUM_QUEUES>, 1>,
    #[pin]
    reclaim: Work<Virtqueues<Engine, NUM_QUEUES>, 2>,
    /// Something came back, or the gate moved.
    #[pin]
    moved: CondVar,
    /// To be dropped by `reclaim`.
    #[pin]
    released: SpinLock<Option<KBox<Held>>>,
    /// To be released when the host has been told, which there was no room for yet, or has
    /// forgotten everything.
    #[pin]
    limbo: SpinLock<Option<KBox<Held>>>,
    refusals: Atomic<u32>,
    /// What the host says of its resources.
    word: Atomic<u32>,
    /// How many resources there are that the host has refused to create. It does not know all of
    /// them, and has kept its word all the same.
    missing: Atomic<u32>,
}

/// Nothing that anybody relies on.
const NO_WORD: u32 = 0;
/// It has kept them over a reset.
const KEPT: u32 = 1;
/// The same, but it does not know one of them.
const BROKEN: u32 = 2;

impl_has_work! {
    impl HasWork<Virtqueues<Self, NUM_QUEUES>, 0> for Engine { self.dequeue_ctrl }
    impl HasWork<Virtqueues<Self, NUM_QUEUES>, 1> for Engine { self.dequeue_cursor }
    impl HasWork<Virtqueues<Self, NUM_QUEUES>, 2> for Engine { self.reclaim }
}

impl Engine {
    fn new(dev: &device::Device) -> impl PinInit<Self> + use<> {
        let dev = dev.into();

        pin_init!(Self {
            dev,
            dequeue_ctrl <- new_work!("virtgpu_rs::dequeue_ctrl"),
            dequeue_cursor <- new_work!("virtgpu_rs::dequeue_cursor"),
            reclaim <- new_work!("virtgpu_rs::reclaim"),
            moved <- new_condvar!(),
            released <- new_spinlock!(None),
            limbo <- new_spinlock!(None),
            refusals: Atomic::new(0),
            word: Atomic::new(NO_WORD),
            missing: Atomic::new(0),
        })
    }

    /// Says that the host refused a command, in the words of the C driver. A host that refuses all
    /// day is not given the log.
    fn refused(&self, command: u32, ty: u32) {
        let count = self.refusals.fetch_add(1, Relaxed).wrapping_add(1);

        if count <= 10 || count.is_power_of_two() {
            dev_err!(
                self.dev,
                "*ERROR* response 0x{:x} (command 0x{:x} {}), {} so far\n",
                ty,
                command,
                uapi::command_name(command),
                count
            );
        }
        if command == uapi::ResourceCreate2d::TYPE
            && (uapi::resp::ERR_UNSPEC..=uapi::resp::ERR_INVALID_PARAMETER).contains(&ty)
        {
            self.missing.fetch_add(1, Relaxed);
        }
        if ty != uapi::resp::ERR_INVALID_RESOURCE_ID {
            return;
        }
        if self.missing.load(Relaxed) > 0 {
            // It may be one of those.
            if command == uapi::ResourceUnref::TYPE {
                self.missing.fetch_sub(1, Relaxed);
            }
        } else if self.word.cmpxchg(KEPT, BROKEN, Relaxed).is_ok() {
            dev_warn!(self.dev, "the host did not keep all of its resources\n");
        }
    }

    /// Whether only a reset can bring back what the host says it has.
    fn is_word_broken(&self) -> bool {
        self.word.load(Relaxed) == BROKEN
    }

    /// Adds `held`, and whatever hangs on it, to a list.
    fn push(list: &SpinLock<Option<KBox<Held>>>, held: KBox<Held>) {
        let mut head = list.lock();
        let mut rest = Some(held);

        while let Some(mut held) = rest {
            rest = held.next.take();
            held.next = head.take();
            *head = Some(held);
        }
    }

    fn pop(list: &SpinLock<Option<KBox<Held>>>) -> Option<KBox<Held>> {
        let mut head = list.lock();
        let mut held = head.take()?;

        *head = held.next.take();
        Some(held)
    }

    fn release(&self, held: KBox<Held>) {
        Self::push(&self.released, held);
    }

    /// Takes a whole list, to be dropped without a lock held.
    fn take(list: &SpinLock<Option<KBox<Held>>>) -> Option<KBox<Held>> {
        list.lock().take()
    }
}

impl virtio::queue::Handler<NUM_QUEUES> for Engine {
    type Token = Token;
    type State = QueueState;

    fn interrupt(queues: ArcBorrow<'_, Virtqueues<Self, NUM_QUEUES>>, index: usize) {
        let queues: Arc<_> = queues.into();

        // Already queued is as good.
        let _ = match index {
            CTRL => workqueue::system_percpu().enqueue::<Arc<_>, 0>(queues),
            _ => workqueue::system_percpu().enqueue::<Arc<_>, 1>(queues),
        };
    }
}

impl WorkItem<0> for Engine {
    type Pointer = Arc<Virtqueues<Self, NUM_QUEUES>>;

    fn run(queues: Self::Pointer) {
        dequeue(&queues, CTRL);
    }
}

impl WorkItem<1> for Engine {
    type Pointer = Arc<Virtqueues<Self, NUM_QUEUES>>;

    fn run(queues: Self::Pointer) {
        dequeue(&queues, CURSOR);
    }
}

impl WorkItem<2> for Engine {
    type Pointer = Arc<Virtqueues<Self, NUM_QUEUES>>;

    fn run(queues: Self::Pointer) {
        drop(Engine::take(&queues.handler().released));
    }
}

/// Completes what the host has returned.
fn dequeue(queues: &Arc<Virtqueues<Engine, NUM_QUEUES>>, index: usize) {
    let engine = queues.handler();
    let mut answer = Answer::default();
    let mut payload = None;
    // What the host has forgotten, as it ought to, and whether there is anything else.
    let mut forgotten = None;
    let mut released = false;
    let mut guard = queues.lock(index);
    let mut progress = false;

    let broken = loop {
        guard.disable_callbacks();

        let mut any = false;

        while let Some(returned) = guard.get(&mut answer) {
            any = true;

            let returned = match returned {
                Ok(mut done) if done.token.is_routine(&answer) => {
                    if let Done::Release(mut held) = done.token.done {
                        held.next = forgotten.take();
                        forgotten = Some(held);
                        continue;
                    }
                    // One payload can wait until the lock is released.
                    if payload.is_none() {
                        payload = done.payload.take();
                    }
                    if done.payload.is_none() {
                        continue;
                    }
                    Ok(done)
                }
                other => other,
            };

            // Not under the lock: to complete is to wake, and payloads may be large.
            drop(guard);
            payload = None;
            match returned {
                Ok(done) => {
                    released |= matches!(done.token.done, Done::Release(_));
                    done.token.complete(engine, Ok(&mut answer));
                }
                Err(_) => kernel::do_once_lite! {
                    dev_err!(
                        engine.dev,
                        "*ERROR* the host returned a buffer that it did not have\n"
                    )
                },
            }
            answer = Answer::default();
            guard = queues.lock(index);
        }
        if any {
            let state = guard.state();

            progress = true;
            state.returned = state.returned.wrapping_add(1);
            state.stalled = false;
            if state.sleepers > 0 {
                engine.moved.notify_all();
            }
        }
        if guard.is_broken() {
            // Before anybody finds out the hard way. Nothing else comes back.
            guard.state().shut();
            engine.moved.notify_all();
            break true;
        }
        if guard.enable_callbacks() {
            break false;
        }
    };
    let owing = progress && guard.state().owing;

    drop(guard);

    if broken || engine.is_word_broken() {
        Queue(queues.clone()).report_broken();
    } else if owing {
        Queue(queues.clone()).retry();
    }
    if let Some(held) = forgotten {
        engine.release(held);
        released = true;
    }
    if released {
        let _ = workqueue::system_percpu().enqueue::<Arc<_>, 2>(queues.clone());
    }
}

/// A command whose answer somebody wants to have; see [`Queue::ask`].
pub(crate) struct Question {
    command: u32,
    reply: Arc<Reply>,
}

impl Question {
    /// Waits for the answer.
    ///
    /// Errors: what the host's answer comes closest to, and [`ETIMEDOUT`]: the host has until
    /// [`TIMEOUT_MS`] to give one. [`ECANCELED`] if it cannot any more: the device has been reset,
    /// or has to be. [`EIO`] and [`ENODEV`] as for [`Queue::submit`], and [`ERESTARTSYS`] for a
    /// caller that is being killed.
    pub(crate) fn wait(self, queue: &Queue, who: Who) -> Result<Answer> {
        let mut left = msecs_to_jiffies(TIMEOUT_MS);
        let mut guard = queue.0.lock(CTRL);

        loop {
            if let Some(answer) = self.reply.lock().take() {
                return answer;
            }
            if let ControlFlow::Break(error) = guard.state().gate.admit(who) {
                return Err(error);
            }
            if guard.is_broken() {
                return Err(ECANCELED);
            }
            if left == 0 {
                break;
            }
            left = queue.sleep(&mut guard, left, who)?;
        }
        drop(guard);
        dev_err!(
            queue.0.handler().dev,
            "*ERROR* no answer to {} within {} ms\n",
            uapi::command_name(self.command),
            TIMEOUT_MS
        );
        Err(ETIMEDOUT)
    }

    /// Returns the answer if there is one already, and [`ETIMEDOUT`] if not.
    pub(crate) fn answer(self) -> Result<Answer> {
        self.reply.lock().take().unwrap_or(Err(ETIMEDOUT))
    }
}

/// Whether a command has failed because the device has to be reset, is reset, or is gone.
pub(crate) fn is_lost(error: Error) -> bool {
    [EIO, ECANCELED, ENODEV].contains(&error)
}

/// A wait of somebody who wants to put something into the control queue.
#[derive(Clone, Copy)]
struct Wait {
    /// Whether the gate is open. Where it is not, this is the wait for the end of a recovery, which
    /// has its own time.
    open: bool,
    /// What remains of the time.
    left: Jiffies,
    /// [`QueueState::returned`] at the beginning.
    since: u32,
}

impl Wait {
    fn new(state: &QueueState) -> Self {
        Self {
            open: state.gate == Gate::Running,
            left: msecs_to_jiffies(TIMEOUT_MS),
            since: state.returned,
        }
    }
}

/// Where somebody stands who is sent away by [`Queue::try_submit`], waits, and tries again.
#[derive(Default)]
pub(crate) struct Turn {
    /// Nothing before the first time.
    wait: Option<Wait>,
    /// [`QueueState::returned`] when the ring was full, nothing if the gate was closed.
    full: Option<u32>,
}

/// A queue, locked.
type Guard<'a> = virtio::queue::Guard<'a, Token, QueueState>;

/// The device's queues, as the driver sees them.
#[derive(Clone)]
pub(crate) struct Queue(Arc<Virtqueues<Engine, NUM_QUEUES>>);

impl Queue {
    /// Prepares queues that are not connected to anything yet. `dev` is named in messages.
    pub(crate) fn new(dev: &device::Device) -> Result<Self> {
        Ok(Self(Virtqueues::new(
            [c"control", c"cursor"],
            [QueueState::new(), QueueState::new()],
            Engine::new(dev),
        )?))
    }

    /// Finds the device's virtqueues and tells it that the driver is ready for them.
    ///
    /// Probe and restore both begin with this, on a device that has been reset and has agreed on
    /// its features. Afterwards [`Who::Pm`] may issue commands, and [`Queue::open`] lets in
    /// everybody else.
    pub(crate) fn init_vqs(&self, dev: &virtio::Device<device::Bound>) -> Result {
        self.0.lock(CTRL).state().exposed = true;
        self.0.find(dev)?;
        dev.ready();
        Ok(())
    }

    /// Ends all traffic. The only order in which that is safe, for freeze, shutdown, removal and a
    /// failed probe alike: nobody gets in any more, the device is reset, the queues are deleted,
    /// what it still held is completed with an error, and no work is left that could look at it.
    ///
    /// With `drain`, what is in the ring is announced to the host and waited for before the reset.
    /// `last` is what the gate says afterwards.
    pub(crate) fn stop(&self, drain: bool, last: Gate) {
        let engine = self.0.handler();

        if drain && !self.drain() && !self.is_broken() {
            dev_err!(
                engine.dev,
                "*ERROR* the host did not answer {} commands within {} ms\n",
                self.in_flight(),
                TIMEOUT_MS
            );
        }
        self.set_gate(last);
        self.0
            .stop(|_, token| token.complete(engine, Err(ECANCELED)));

        let mut guard = self.0.lock(CTRL);

        guard.state().exposed = false;

        // The host has no access any more, whatever it was or was not told.
        let forgotten = match last {
            Gate::Frozen => None,
            _ => Engine::take(&engine.limbo),
        };

        drop(guard);
        drop(forgotten);
        self.settle();
    }

    /// Resets the device, and finds its queues again: whatever the host had, and whatever it made
    /// of its queues, it now has nothing, and the queues are as good as new.
    ///
    /// What was in flight is completed with an error. Afterwards [`Who::Pm`] may issue commands, as
    /// after [`Queue::init_vqs`]; on error, nobody may.
    pub(crate) fn restart(&self) -> Result {
        let engine = self.0.handler();

        self.set_gate(Gate::Frozen);

        let result = self
            .0
            .restart(|_, token| token.complete(engine, Err(ECANCELED)));

        self.settle();
        result?;
        self.device().ok_or(ENODEV)?.ready();
        Ok(())
    }

    /// Waits for work items after a reset, and wakes who waits for the queues to become idle.
    fn settle(&self) {
        let engine = self.0.handler();

        engine.dequeue_ctrl.flush();
        engine.dequeue_cursor.flush();
        engine.reclaim.flush();
        drop(Engine::take(&engine.released));
        engine.word.store(NO_WORD, Relaxed);
        // Nothing came back from the queues, but they are empty, and answers have become errors.
        // Who looks for them under the lock has seen that, or sleeps by now.
        drop(self.0.lock(CTRL));
        engine.moved.notify_all();
    }

    /// Lets everybody in.
    pub(crate) fn open(&self) {
        self.set_gate(Gate::Running);
        self.retry();
    }

    /// Takes the host's word that it has kept its resources over a reset: if it refuses one as
    /// unknown, [`Queue::needs_reset`] is true, once. As long as there is a resource that it has
    /// refused to create, that proves nothing.
    pub(crate) fn trust(&self) {
        self.0.handler().word.store(KEPT, Relaxed);
    }

    /// Whether the device has asked to be reset, or does not work before it is.
    pub(crate) fn needs_reset(&self) -> bool {
        self.is_broken()
            || self.0.handler().is_word_broken()
            || self.device().is_some_and(|dev| dev.needs_reset())
    }

    /// Whether the device has been taken away.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.lock(CTRL).state().gate == Gate::Gone
    }

    fn is_broken(&self) -> bool {
        (0..NUM_QUEUES).any(|index| self.0.lock(index).is_broken())
    }

    /// Tells the driver that the device has to be reset, in the way of a device that asks for it.
    fn report_broken(&self) {
        for index in 0..NUM_QUEUES {
            self.0.lock(index).state().shut();
        }
        if let Some(dev) = self.device() {
            dev.notify_config_changed();
        }
    }

    /// Closes the gate for all but [`Who::Pm`], and waits until the host has answered everything.
    ///
    /// Returns whether it has.
    pub(crate) fn drain(&self) -> bool {
        self.set_gate(Gate::Draining);
        self.wait_idle()
    }

    /// Waits until the host has answered everything, whoever may still issue commands: as long as
    /// it goes on answering, and [`TIMEOUT_MS`] after the last answer. Not for a device that is
    /// gone.
    pub(crate) fn wait_idle(&self) -> bool {
        let engine = self.0.handler();

        for index in 0..NUM_QUEUES {
            self.kick(index);

            let mut guard = self.0.lock(index);
            let mut left = msecs_to_jiffies(TIMEOUT_MS);
            let mut before = guard.in_flight();

            while guard.in_flight() > 0 {
                if left == 0 || guard.is_broken() || guard.state().gate == Gate::Gone {
                    return false;
                }
                guard.state().sleepers += 1;
                left = guard.wait(&engine.moved, left);
                guard.state().sleepers -= 1;
                // A host that is slow is not one that is stuck.
                if guard.in_flight() < before {
                    before = guard.in_flight();
                    left = msecs_to_jiffies(TIMEOUT_MS);
                }
            }
        }
        // A buffer leaves the queue before its token is complete.
        engine.dequeue_ctrl.flush();
        engine.dequeue_cursor.flush();
        true
    }

    fn in_flight(&self) -> usize {
        (0..NUM_QUEUES)
            .map(|index| self.0.lock(index).in_flight())
            .sum()
    }

    /// The device, as long as it has queues; see [`Virtqueues::device`].
    pub(crate) fn device(&self) -> Option<virtio::queue::ConnectedDevice<'_>> {
        self.0.device()
    }

    /// Moves the gate, and wakes everybody who sleeps before it.
    pub(crate) fn set_gate(&self, gate: Gate) {
        for index in 0..NUM_QUEUES {
            let mut guard = self.0.lock(index);
            let state = guard.state();

            if state.gate.may_become(gate) {
                state.gate = gate;
                state.stalled = false;
            }
        }
        self.0.handler().moved.notify_all();
    }

    /// Tells the host that there is something in a queue.
    pub(crate) fn kick(&self, index: usize) {
        let wanted = self.0.lock(index).kick_prepare();

        if wanted {
            self.0.notify(index);
        }
    }

    /// Puts a command into the control queue that nobody waits for; the host learns of it with the
    /// next [`Queue::kick`]. If it fails there, that is logged, and counted in `tally`.
    ///
    /// Waits while the ring is full or the gate is closed for a while. Process context, without a
    /// lock that completing a command, reclaiming memory or faulting a page in may need.
    ///
    /// Errors: [`ENODEV`] when the device is gone, [`EIO`] when it is wedged, [`ETIMEDOUT`],
    /// [`ERESTARTSYS`] for a caller that is being killed, [`E2BIG`] for a command that the ring can
    /// never hold, [`ENOMEM`].
    pub(crate) fn submit<C: Command>(
        &self,
        command: &C,
        tally: Option<&Arc<Tally>>,
        who: Who,
    ) -> Result {
        const { assert!(C::ANSWER_LEN <= virtio::queue::RESPONSE_INLINE) };

        self.submit_bytes(
            command.as_bytes(),
            None,
            &mut Response::Inline(C::ANSWER_LEN),
            Token::unattended::<C>(tally),
            who,
            None,
        )
    }

    /// Like [`Queue::submit`], but does not wait, and may have a payload.
    ///
    /// Errors: likewise, and [`EAGAIN`] where it would have to wait. Somebody who can wait calls
    /// [`Queue::wait_turn`] with the same `turn` then, and tries again.
    pub(crate) fn try_submit<C: Command>(
        &self,
        command: &C,
        payload: Option<&Arc<Payload>>,
        tally: Option<&Arc<Tally>>,
        who: Who,
        turn: &mut Turn,
    ) -> Result {
        const { assert!(C::ANSWER_LEN <= virtio::queue::RESPONSE_INLINE) };

        self.submit_bytes(
            command.as_bytes(),
            payload,
            &mut Response::Inline(C::ANSWER_LEN),
            Token::unattended::<C>(tally),
            who,
            Some(turn),
        )
    }

    /// Puts a command into the control queue. Waits, unless there is a `turn` to wait for later.
    fn submit_bytes(
        &self,
        command: &[u8],
        payload: Option<&Arc<Payload>>,
        response: &mut Response,
        mut token: Token,
        who: Who,
        turn: Option<&mut Turn>,
    ) -> Result {
        let mut wait = None;
        let mut guard = self.0.lock(CTRL);

        loop {
            let full = match guard.state().gate.admit(who) {
                ControlFlow::Continue(true) => {
                    match guard.add(command, payload, response, token) {
                        Ok(()) => return Ok(()),
                        Err(refused) if refused.error == ENOSPC => token = refused.token,
                        Err(refused) => return Err(refused.error),
                    }
                    true
                }
                ControlFlow::Continue(false) => false,
                ControlFlow::Break(error) => return Err(error),
            };

            if let Some(turn) = turn {
                turn.full = full.then(|| guard.state().returned);
                return Err(EAGAIN);
            }

            guard = self.wait_to_enter(guard, full, who, &mut wait)?;
        }
    }

    /// Waits for room in the control queue, if it is `full`, or else before the gate. There is no
    /// `wait` yet when this is called first.
    #[cold]
    fn wait_to_enter<'a>(
        &'a self,
        mut guard: Guard<'a>,
        full: bool,
        who: Who,
        wait: &mut Option<Wait>,
    ) -> Result<Guard<'a>> {
        // The host may not have been told of what fills the ring.
        if full && guard.kick_prepare() {
            drop(guard);
            self.0.notify(CTRL);
            return Ok(self.0.lock(CTRL));
        }

        // As if there was room. For all but `Pm`, `dequeue` closes the gate when it finds out, but
        // not for a device that was pulled out while it was about to go to sleep, until that is
        // over.
        if full && guard.is_broken() {
            return Err(EIO);
        }

        let mut now = Wait::new(guard.state());

        if let Some(begun) = wait.filter(|it| it.open == now.open) {
            now = begun;
        }
        guard.state().may_wait(full, &now)?;

        let returned = guard.state().returned;

        now.left = self.sleep(&mut guard, now.left, who)?;

        // Behind the closed gate only recovery is left: whatever comes back makes room for it, and
        // a device that is being recovered, slowly, is one that works. Who can fail does not wait
        // for all of it: others wait for them.
        let anew = !now.open && who != Who::Ioctl && guard.state().returned != returned;

        *wait = (!anew).then_some(now);
        Ok(guard)
    }

    /// Puts a command into the control queue, tells the host, and waits for the answer.
    ///
    /// Errors: those of [`Queue::submit`], and what the host's answer comes closest to; the host
    /// has until [`TIMEOUT_MS`] to give one.
    pub(crate) fn call<C: Command>(&self, command: &C, who: Who) -> Result<Answer> {
        let question = self.ask(command, who)?;

        self.kick(CTRL);
        question.wait(self, who)
    }

    /// Puts a command into the control queue, whose answer will be waited for with
    /// [`Question::wait`]. The host learns of it with the next [`Queue::kick`].
    ///
    /// Errors: [`ENOMEM`], and those of [`Queue::submit`].
    pub(crate) fn ask<C: Command>(&self, command: &C, who: Who) -> Result<Question> {
        let mut response = if C::ANSWER_LEN <= virtio::queue::RESPONSE_INLINE {
            Response::Inline(C::ANSWER_LEN)
        } else {
            Response::Pages(ResponseBuf::new(C::ANSWER_LEN)?)
        };
        let reply = Arc::pin_init(new_spinlock!(None), GFP_KERNEL)?;
        let token = Token::new::<C>(Done::Reply(reply.clone()));

        self.submit_bytes(command.as_bytes(), None, &mut response, token, who, None)?;
        Ok(Question {
            command: C::TYPE,
            reply,
        })
    }

    /// Waits until [`Queue::try_submit`] may have a better chance.
    ///
    /// Context and errors: as for [`Queue::submit`]. The time is that of all waits for this `turn`,
    /// as long as it does not find the gate opened or closed.
    pub(crate) fn wait_turn(&self, who: Who, turn: &mut Turn) -> Result {
        let mut guard = self.0.lock(CTRL);

        loop {
            let admitted = match guard.state().gate.admit(who) {
                ControlFlow::Continue(admitted) => admitted,
                ControlFlow::Break(error) => return Err(error),
            };

            if admitted {
                // As when it is submitted.
                if guard.is_broken() {
                    return Err(EIO);
                }
                // Something has come back since, or the gate was opened, or there is nothing that
                // could come back.
                if turn.full != Some(guard.state().returned) || guard.in_flight() == 0 {
                    return Ok(());
                }
            }
            guard = self.wait_to_enter(guard, admitted, who, &mut turn.wait)?;
            turn.full = None;
        }
    }

    /// Sleeps until something comes back, or the gate moves, for `left` at the most. Returns what
    /// remains of that.
    fn sleep(&self, guard: &mut Guard<'_>, left: Jiffies, who: Who) -> Result<Jiffies> {
        let moved = &self.0.handler().moved;

        guard.state().sleepers += 1;
        let slept = match who {
            Who::Ioctl => guard.wait_killable(moved, left),
            _ => Ok(guard.wait(moved, left)),
        };
        guard.state().sleepers -= 1;
        slept
    }

    /// Has the host forget the resource that `held` belongs to, and lets go of `held` then. Does
    /// not wait: where there is no room, the host is told when there is.
    ///
    /// Returns what can be dropped at once: the host cannot be told, nor reach it, any more.
    pub(crate) fn unref(&self, held: KBox<Held>) -> Option<KBox<Held>> {
        let mut guard = self.0.lock(CTRL);
        let held = match guard.state().gate.admit(Who::Kernel) {
            ControlFlow::Continue(true) => match Self::add_unref(&mut guard, held) {
                Ok(()) => {
                    let wanted = guard.kick_prepare();

                    drop(guard);
                    if wanted {
                        self.0.notify(CTRL);
                    }
                    return None;
                }
                Err(held) => held,
            },
            _ => held,
        };
        let state = guard.state();

        // Under the same lock: if the ring is full, the answers that make room find out that
        // something is owed. And once the device is wedged or gone, and has been reset, nobody
        // empties the list any more. While it sleeps, the host may keep what it has.
        if state.exposed || matches!(state.gate, Gate::Draining | Gate::Frozen) {
            state.owing = true;
            Engine::push(&self.0.handler().limbo, held);
            return None;
        }
        drop(guard);
        Some(held)
    }

    /// Puts the command into the ring that has the host forget a resource, or returns what the
    /// resource is made of if that is not possible now.
    fn add_unref(guard: &mut Guard<'_>, held: KBox<Held>) -> Result<(), KBox<Held>> {
        let added = guard.add(
            command::resource_unref(held.resource).as_bytes(),
            None,
            &mut Response::Inline(uapi::ResourceUnref::ANSWER_LEN),
            Token::release(held),
        );

        match added.map_err(|refused| refused.token.done) {
            Err(Done::Release(held)) => Err(held),
            // No other token was given.
            _ => Ok(()),
        }
    }

    /// Tells the host what there was no room for.
    ///
    /// This comes before anybody who was woken. If somebody sleeps, who may want the same room, it
    /// is theirs every other time that something comes back, as long as there is a next time.
    fn retry(&self) {
        let engine = self.0.handler();
        let mut any = false;

        loop {
            // In one go: nothing must get in after the host has forgotten everything.
            let mut guard = self.0.lock(CTRL);

            if guard.state().gate != Gate::Running {
                break;
            }
            if guard.state().sleepers > 0
                && guard.state().returned % 2 == 0
                && guard.in_flight() > 0
            {
                break;
            }

            let Some(held) = Engine::pop(&engine.limbo) else {
                guard.state().owing = false;
                break;
            };

            if let Err(held) = Self::add_unref(&mut guard, held) {
                Engine::push(&engine.limbo, held);
                break;
            }
            any = true;
        }
        if any {
            self.kick(CTRL);
        }
    }

    /// The host has forgotten everything, and what it was to be told to forget, too. Returns what
    /// was kept for that.
    #[must_use]
    pub(crate) fn forget(&self) -> Option<KBox<Held>> {
        let engine = self.0.handler();

        engine.missing.store(0, Relaxed);
        Engine::take(&engine.limbo)
    }
}

#[kunit_tests(virtgpu_rs_queue)]
mod tests {
    use super::*;

    const GATES: [Gate; 5] = [
        Gate::Running,
        Gate::Draining,
        Gate::Frozen,
        Gate::Wedged,
        Gate::Gone,
    ];

    fn passes(gate: Gate, who: Who) -> Option<bool> {
        match gate.admit(who) {
            ControlFlow::Continue(pass) => Some(pass),
            ControlFlow::Break(_) => None,
        }
    }

    #[test]
    fn an_open_gate_lets_everybody_in() {
        for who in [Who::Ioctl, Who::Kernel, Who::Pm] {
            assert_eq!(passes(Gate::Running, who), Some(true));
        }
    }

    #[test]
    fn only_suspend_passes_a_closed_gate() {
        for gate in [Gate::Draining, Gate::Frozen] {
            assert_eq!(passes(gate, Who::Pm), Some(true));
            assert_eq!(passes(gate, Who::Kernel), Some(false));
            assert_eq!(passes(gate, Who::Ioctl), Some(false));
        }
    }

    #[test]
    fn nobody_passes_the_gate_of_a_lost_device() {
        for who in [Who::Ioctl, Who::Kernel, Who::Pm] {
            assert_eq!(passes(Gate::Wedged, who), None);
            assert_eq!(passes(Gate::Gone, who), None);
        }
    }

    #[test]
    fn a_device_that_is_gone_stays_gone() {
        for gate in GATES {
            assert_eq!(Gate::Gone.may_become(gate), gate == Gate::Gone);
            assert!(Gate::Wedged.may_become(gate));
            assert!(gate.may_become(Gate::Gone));
        }
    }

    /// The state of a queue after somebody has waited in vain for room, while the host returned
    /// something or not.
    fn after_waiting_in_vain(returned: u32) -> QueueState {
        let mut state = QueueState::new();
        let mut wait = Wait::new(&state);

        assert_eq!(state.may_wait(true, &wait), Ok(()));
        state.returned += returned;
        wait.left = 0;
        assert_eq!(state.may_wait(true, &wait), Err(ETIMEDOUT));
        state
    }

    #[test]
    fn nobody_waits_for_room_where_nothing_came_back() {
        let mut state = after_waiting_in_vain(0);
        let wait = Wait::new(&state);

        assert_eq!(state.may_wait(true, &wait), Err(ETIMEDOUT));
        assert_eq!(state.may_wait(false, &wait), Ok(()));
    }

    #[test]
    fn others_still_wait_where_the_room_was_taken() {
        let mut state = after_waiting_in_vain(1);
        let wait = Wait::new(&state);

        assert_eq!(state.may_wait(true, &wait), Ok(()));
    }
}
